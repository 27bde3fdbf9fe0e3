"""One question to the curator models, from the prompt to the parsed answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cosr_jax.curator.calls import CallError, Question
from cosr_jax.curator.client import Client
from cosr_jax.curator.parsing import ParseResult, parse
from cosr_jax.curator.prompts import Prompt
from cosr_jax.curator.proving import Judge
from cosr_jax.curator.questions import SCHEMA_OF_ROLE, question
from cosr_jax.types import Completion, Task, Verdict


@dataclasses.dataclass(frozen=True)
class Counsel:
    """What a model said, parsed, and at which endpoint."""

    result: ParseResult  # with a value
    endpoint: str


def consult(
    client: Client,
    build: Callable[[int], Prompt],
    max_tokens: int,
    judge: Judge | None = None,
) -> Counsel:
    """What a model answers, as far as the parser can use it; asked again as the client sees fit.

    Args:
      client: asks.
      build: one of ``prompts``' functions but for its ``max_tokens``.
      max_tokens: longest prompt, estimated.
      judge: with which authored tasks prove themselves.

    Raises:
      CallError: no model gave an answer of which anything can be kept.
      UserError: a recording is missing or damaged, or no prompt fits.
    """
    (counsel,) = consult_each(client, build, max_tokens, ((),), judge)
    if isinstance(counsel, CallError):
        raise counsel
    return counsel


def consult_each(
    client: Client,
    build: Callable[[int], Prompt],
    max_tokens: int,
    endpoints: Sequence[tuple[str, ...]],
    judge: Judge | None = None,
) -> list[Counsel | CallError]:
    """As ``consult``, the same question put to each of ``endpoints`` at once.

    Args:
      client: asks.
      build: one of ``prompts``' functions but for its ``max_tokens``.
      max_tokens: longest prompt, estimated.
      endpoints: for each answer the names of those who may give it, the preferred one first; ():
        those of the role.
      judge: with which authored tasks prove themselves.

    Raises:
      UserError: a recording is missing or damaged, or no prompt fits.
    """
    if judge is not None:
        judge = remembering(judge)  # an answer is parsed when it arrives, and here again
    prompt = build(max_tokens)
    replies = client.ask_all(to_each(build, max_tokens, endpoints, judge))
    schema = SCHEMA_OF_ROLE[prompt.request.role]
    return [
        reply
        if isinstance(reply, CallError)
        else Counsel(parse(schema, reply, prompt.context, judge), reply.endpoint)
        for reply in replies
    ]


def to_each(
    build: Callable[[int], Prompt],
    max_tokens: int,
    endpoints: Sequence[tuple[str, ...]],
    judge: Judge | None = None,
) -> list[Question]:
    """The questions of ``consult_each``, for who wants to ask them ahead."""
    asked = question(build, max_tokens, judge)
    return [dataclasses.replace(asked, endpoints=names) for names in endpoints]


def remembering(judge: Judge) -> Judge:
    """``judge``, which is asked about each case once."""
    known: dict[tuple[Task, str], Verdict] = {}

    def judge_new(cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        keys = [(task, completion.text) for task, completion in cases]
        new = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
        if new:
            known.update(zip(new, judge(list(new.values())), strict=True))
        return [known[key] for key in keys]

    return judge_new
