"""Settings of the language-model curator's client: which models, how patient, at what price."""

from __future__ import annotations

import dataclasses

from cosr_jax.config import setting


@dataclasses.dataclass(frozen=True)
class CuratorLlmConfig:
    endpoints: tuple[str, ...] = setting(
        (),
        "OpenAI-compatible servers, as 'NAME URL option=value ...'; options: model (default: "
        "NAME), key (the environment variable that holds the API key), input and output (dollars "
        "per million tokens), context (tokens), sampling (extended: top_k and min_p are sent too; "
        "or plain)",
    )
    roles: tuple[str, ...] = setting(
        (),
        "which endpoints answer for a role, in order of preference, as role=name,name; roles: "
        "analyst, planner, author, checker; a role not named may use every endpoint, in order",
    )
    mode: str = setting(
        "live",
        "live: always ask; cache: reuse good answers from folder; record: keep every outcome in "
        "folder; replay: answer from folder alone, without a server",
        choices=("live", "cache", "record", "replay"),
    )
    folder: str = setting("", "where answers are kept; needed unless mode is live")
    deadline_s: float = setting(
        600.0, "longest time for one question, with queueing, retries and waiting", above=0.0
    )
    timeout_s: float = setting(300.0, "longest time for one HTTP request", above=0.0)
    max_attempts: int = setting(
        5, "HTTP requests to one endpoint for one question, at most", low=1, high=100
    )
    max_reasks: int = setting(
        2, "times a model is asked again with the errors of its answer", low=0, high=10
    )
    concurrency: int = setting(8, "HTTP requests at once, over all endpoints", low=1, high=1024)
    breaker_failures: int = setting(
        5, "failures in a row after which an endpoint is left alone", low=1
    )
    breaker_cooldown_s: float = setting(
        60.0, "time after which one request tests an endpoint left alone", above=0.0
    )
    calls_per_run: int = setting(0, "HTTP requests in a run; 0: no limit", low=0)
    calls_per_round: int = setting(0, "HTTP requests in a round; 0: no limit", low=0)
    tokens_per_run: int = setting(0, "tokens in and out in a run; 0: no limit", low=0)
    tokens_per_round: int = setting(0, "tokens in and out in a round; 0: no limit", low=0)
    dollars_per_run: float = setting(0.0, "money in a run; 0: no limit", low=0.0)
    dollars_per_round: float = setting(0.0, "money in a round; 0: no limit", low=0.0)
    prompt_tokens: int = setting(
        12_000, "longest prompt; examples are left out until it fits", low=4_000
    )
    temperature: float = setting(1.0, "sampling temperature", low=0.0, high=2.0)
    top_p: float = setting(1.0, "nucleus; 1 is off", above=0.0, high=1.0)
