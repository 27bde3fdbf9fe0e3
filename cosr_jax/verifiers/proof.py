"""Judges terms and witnesses: goals shown by z3 in workers, witnesses by checking programs here.

What a completion may write is parsed by strict readers (``smt_text``, ``property_text``,
``witness``) of bounded size, and only terms that they built reach the solver.  A goal counts when
the solver shows it; a counter-example goes into the verdict's detail.  A solver that finds neither
within its budget is the student's failure ("timeout"): the task's own solution was shown within
it when the task was admitted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from cosr_jax.types import Completion, Outcome, ProofChecks, Task, UserError, Verdict
from cosr_jax.verifiers import property_text, smt_text, witness
from cosr_jax.verifiers.blocks import extract_block
from cosr_jax.verifiers.dispatch import Workers
from cosr_jax.verifiers.extraction import Extraction
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.terms import Function, Goals, Refusal, smt_script

#: z3's units of work in one second of the time limit, for all goals together.  A third of what a
#: core of 2026 does, so that the budget ends before the clock does, on a busy machine too.
BUDGET_PER_SECOND = 400_000

#: How reading a text that was never meant as a term fails.
_PROSE = ("syntax_error", "missing_entry_point")


class ProofJudge:
    """Implements ``judges.Judge`` for tasks with ``ProofChecks``.

    The reward is the fraction of goals shown; all of them pass.  A witness is right or wrong.

    Args:
      workers: of the method "smt"; whoever made them closes them.
    """

    def __init__(self, workers: Workers):
        self._workers = workers

    async def start(self) -> None:
        """Looks for z3.

        Raises:
          UserError: it is not installed.
        """
        if importlib.util.find_spec("z3") is None:
            raise UserError(
                "tasks of domain 'proof' need the package z3-solver, which is not installed",
                'pip install "cosr-jax[proof]"',
            )

    async def close(self) -> None:
        """Nothing to do: the workers are somebody else's."""

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict on ``completion``; a task that cannot be read is an ERROR."""
        began = time.perf_counter()
        checks = task.checks
        assert isinstance(checks, ProofChecks)
        if checks.kind == "witness":
            verdict = witness_verdict(checks, completion)
        else:
            verdict = await self._term_verdict(checks, completion, limits)
        return dataclasses.replace(verdict, seconds=time.perf_counter() - began)

    async def _term_verdict(
        self, checks: ProofChecks, completion: Completion, limits: Limits
    ) -> Verdict:
        try:
            goals, read = _reader(checks)
        except Refusal as refusal:
            return Verdict(Outcome.ERROR, 0.0, detail=f"task: {refusal.detail}")
        found = extract_block(completion.text, completion.finish_reason)
        if found.category:
            return _failure(found.category, "", found)
        try:
            script, wanted = smt_script(goals, read(found.answer))
        except Refusal as refusal:
            if found.method == "bare" and refusal.category in _PROSE:
                return _failure("no_answer", refusal.detail, Extraction("", ""))
            return _failure(refusal.category, refusal.detail, found)
        budget = max(1, int(BUDGET_PER_SECOND * limits.wall_s))
        case = {"script": script, "goals": wanted, "budget": budget}
        answer = await self._workers.ask("smt", case, limits.wall_s, limits.memory_mb)
        if answer.limit:
            return _failure(answer.limit, answer.detail, found)
        if answer.value is None:
            return Verdict(Outcome.ERROR, 0.0, detail=answer.detail)
        return _verdict_of(answer.value, len(wanted), found)


def _reader(checks: ProofChecks) -> tuple[Goals, Callable[[str], Function]]:
    """The goals of a task, and what reads an answer to it."""
    if checks.kind == "smtlib":
        goals = smt_text.read_goals(checks.goal)
        return goals, lambda text: smt_text.read_answer(text, goals.asked)
    goals = property_text.read_goals(checks.goal, checks.instance)
    return goals, lambda text: property_text.read_answer(text, goals, checks.instance)


def _verdict_of(value: dict[str, Any], expected: int, found: Extraction) -> Verdict:
    results = value.get("goals")
    if not isinstance(results, list) or len(results) != expected:
        return Verdict(Outcome.ERROR, 0.0, detail=f"worker sent {value!r:.80}")
    shown = [result["status"] == "valid" for result in results]
    if all(shown):
        return _success(found)
    refuted = next((r for r in results if r["status"] == "refuted"), None)
    if refuted:
        category, detail = "wrong_answer", f"counter-example: {refuted['detail']}"
    else:
        unknown = next(r for r in results if r["status"] != "valid")
        category, detail = "timeout", f"neither shown nor refuted: {unknown['detail']}"
    return _failure(category, detail[:500], found, sum(shown) / expected)


def witness_verdict(checks: ProofChecks, completion: Completion) -> Verdict:
    """The verdict of a checking program, without any worker."""
    try:
        program = witness.load(checks.goal, checks.instance)
    except ValueError as error:
        return Verdict(Outcome.ERROR, 0.0, detail=f"task: {error}")
    found = witness.extract(completion.text, completion.finish_reason)
    if found.category:
        return _failure(found.category, "", found)
    try:
        complaint = program(witness.read(found.answer))
    except Refusal as refusal:
        return _failure(refusal.category, refusal.detail, found)
    return _failure("wrong_answer", complaint, found) if complaint else _success(found)


def _success(found: Extraction) -> Verdict:
    return Verdict(Outcome.PASS, 1.0, answer=found.answer, method=found.method, value_correct=True)


def _failure(category: str, detail: str, found: Extraction, reward: float = 0.0) -> Verdict:
    return Verdict(
        Outcome.FAIL,
        reward,
        category=category,
        answer=found.answer,
        method=found.method,
        detail=detail,
    )
