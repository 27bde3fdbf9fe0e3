"""Prompts as questions: an answer the parser cannot use is complained about, a prompt too long for
the model is built again with fewer examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cosr_jax.curator.calls import Complaint, Question, Reply, Role
from cosr_jax.curator.parsing import parse
from cosr_jax.curator.prompts import LEAST_TOKENS, Prompt
from cosr_jax.curator.proving import Judge
from cosr_jax.curator.schemas import Context, Schema

SCHEMA_OF_ROLE: Mapping[Role, Schema] = {
    "analyst": "analysis",
    "planner": "plan",
    "author": "tasks",
}

#: Characters of a complaint; it goes back to the model with the whole conversation.
_LONGEST_COMPLAINT = 1_000


def question(
    build: Callable[[int], Prompt], max_tokens: int, judge: Judge | None = None
) -> Question:
    """The question that ``build(max_tokens)`` puts, with what to do if that does not go well.

    Args:
      build: one of ``prompts``' functions but for its ``max_tokens``.
      max_tokens: longest prompt, estimated.
      judge: with which authored tasks prove themselves, see ``parsing.parse``.
    """
    prompt = build(max_tokens)
    schema = SCHEMA_OF_ROLE[prompt.request.role]
    half = max_tokens // 2

    def shorter() -> Question | None:
        return question(build, half, judge) if half >= LEAST_TOKENS else None

    return Question(prompt.request, accepting(schema, prompt.context, judge), shorter)


def accepting(
    schema: Schema, context: Context, judge: Judge | None = None
) -> Callable[[Reply], Complaint | None]:
    """Complains about answers of which the parser can keep nothing."""

    def accept(reply: Reply) -> Complaint | None:
        result = parse(schema, reply, context, judge)
        if not result.error:
            return None
        return Complaint(result.error, (result.detail or result.error)[:_LONGEST_COMPLAINT])

    return accept
