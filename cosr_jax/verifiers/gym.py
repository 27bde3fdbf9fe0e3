r"""Judges items of reasoning-gym with the package's own scorers, which are trusted with little.

The scorers pay for answers buried in text, 13 of its generators pay for garbage, and 11 hand the
answer to ``eval`` or to sympy's ``parse_expr``, which runs it.  So the answer is extracted first,
from ``<answer>`` or ``\boxed{}`` alone; scorers run in killable workers (``gym_scorer``), never
those that would run the answer; each must first refuse garbage and hedges on the very item; and
nothing short of its full score passes.
"""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

from cosr_jax.types import Completion, Outcome, ScorerChecks, Task, UserError, Verdict
from cosr_jax.verifiers.blocks import extract_block
from cosr_jax.verifiers.dispatch import Answer, Workers
from cosr_jax.verifiers.extraction import Extraction, extract_answer
from cosr_jax.verifiers.judges import Limits

#: Generators whose scorers run what they are given: the answer, or (number_sorting) the item.
#: Read in reasoning-gym 0.1.25.
RUNS_ITS_INPUT = frozenset(
    (
        *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "number_sorting"),
        *("polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix"),
        *("string_insertion", "composite"),  # composite hands on to any other
    )
)
_MAX_CHARACTERS = 20_000


class GymJudge:
    """Implements ``judges.Judge`` for tasks with ``ScorerChecks``.

    Args:
      workers: of the method "score"; whoever made them closes them.
    """

    def __init__(self, workers: Workers):
        self._workers = workers

    async def start(self) -> None:
        """Looks for reasoning-gym.

        Raises:
          UserError: it is not installed.
        """
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError(
                "tasks of domain 'gym' need the package reasoning-gym, which is not installed",
                'pip install "cosr-jax[tasks]"',
            )

    async def close(self) -> None:
        """Nothing to do: the workers are somebody else's."""

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict on ``completion``; an item or scorer that cannot be trusted is an ERROR."""
        began = time.perf_counter()

        def verdict(outcome: Outcome, category: str = "", detail: str = "") -> Verdict:
            return Verdict(
                outcome,
                float(outcome is Outcome.PASS),
                category=category,
                answer=found.answer,
                method=found.method,
                value_correct=outcome is Outcome.PASS,
                seconds=time.perf_counter() - began,
                detail=detail,
            )

        found = extract_item_answer(completion.text, completion.finish_reason)
        checks = task.checks
        assert isinstance(checks, ScorerChecks)
        try:
            item = read_item(checks)
        except ValueError as error:
            return verdict(Outcome.ERROR, detail=f"task: {error}")
        if found.category:
            return verdict(Outcome.FAIL, found.category)
        if len(found.answer) > _MAX_CHARACTERS:
            return verdict(Outcome.FAIL, "forbidden", f"more than {_MAX_CHARACTERS} characters")
        case = {"generator": checks.generator, "item": item, "answer": found.answer}
        answer = await self._workers.ask("score", case, limits.wall_s, limits.memory_mb)
        if answer.limit:
            return verdict(Outcome.FAIL, answer.limit, answer.detail)
        return verdict(*_outcome(answer))


def extract_item_answer(text: str, finish_reason: str = "stop") -> Extraction:
    """The last ``<answer>``, of any number of lines, or the last box."""
    found = extract_block(text, finish_reason)
    if found.method == "answer_tag" or "<answer>" in text:
        return found
    boxed = extract_answer(text, finish_reason)
    if boxed.method == "boxed" or boxed.category:
        return boxed
    return Extraction("", "", "truncated" if finish_reason == "length" else "no_answer")


def read_item(checks: ScorerChecks) -> dict[str, Any]:
    """The item that ``checks`` brings.

    Raises:
      ValueError: the item has no question and answer, or the generator's scorer would run code.
    """
    if checks.generator in RUNS_ITS_INPUT:
        raise ValueError(f"the scorer of {checks.generator!r} runs what it is given")
    try:
        item = json.loads(checks.item)
    except RecursionError as error:
        raise ValueError("the item is nested too deep") from error
    if not isinstance(item, dict) or not isinstance(item.get("answer"), str) or not item["answer"]:
        raise ValueError("the item brings no answer of its own")
    return item


def _outcome(answer: Answer) -> tuple[Outcome, str, str]:
    if answer.value is None:
        return Outcome.ERROR, "", answer.detail
    score = answer.value.get("score")
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        return Outcome.ERROR, "", f"worker sent {answer.value!r:.80}"
    if score == 1.0:
        return Outcome.PASS, "", ""
    return Outcome.FAIL, "wrong_answer", str(answer.value.get("detail") or f"score {score:g}")
