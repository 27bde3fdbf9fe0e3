"""Judges maths: extraction and exact comparison here, symbolic comparison in workers.

Extraction and exact comparison are bounded work of microseconds.  ``dispatch`` says when a
symbolic comparison that does not come back is the student's failure, and when it is an ERROR.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from cosr_jax.types import Completion, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.dispatch import Workers
from cosr_jax.verifiers.extraction import METHODS, Extraction, extract_answer
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.math_answer import answers_agree, restates


def check_forms(accept: Sequence[str]) -> None:
    """Raises ``UserError`` if ``config.verifier.accept`` is empty or names an unknown form."""
    for form in accept:
        if form not in METHODS:
            raise UserError(
                f"config.verifier.accept: {form!r} is no form of an answer",
                f"choose among {', '.join(METHODS)}",
            )
    if not accept:
        raise UserError(
            "config.verifier.accept: () accepts no answer", f"choose among {', '.join(METHODS)}"
        )


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What became of one comparison; ``agree`` None is no judgement."""

    agree: bool | None
    limit: str = ""  # "timeout" or "memory_limit": the answer was too expensive to compare
    detail: str = ""
    seconds: float = 0.0  # on workers


class MathJudge:
    """Implements ``judges.Judge`` for maths.

    A verdict passes if the value is right and its form is in ``config.accept``; a right value in
    another form has ``value_correct`` but fails with "no_answer" ("truncated" if the length limit
    cut the completion).

    Args:
      accept: forms of the answer that count, of ``extraction.METHODS``.
      workers: of the method "compare"; whoever made them closes them.
    """

    def __init__(self, accept: Sequence[str], workers: Workers):
        self._accept = accept
        self._workers = workers

    async def start(self) -> None:
        """Nothing to do: workers start with the first comparison that needs one."""

    async def close(self) -> None:
        """Nothing to do: the workers are somebody else's."""

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict on ``completion``, compared with ``task.answer``."""
        began = time.perf_counter()
        found = extract_answer(completion.text, completion.finish_reason)
        comparison = _Comparison(False)
        if not found.category:
            if restates(task.prompt, found.answer, task.answer):
                comparison = _Comparison(False, detail="restates the question")
            else:
                comparison = _Comparison(answers_agree(found.answer, task.answer))
        seconds = time.perf_counter() - began
        if comparison.agree is None:
            comparison = await self._compare(found.answer, task.answer, limits)
        return self._verdict(completion, found, comparison, seconds + comparison.seconds)

    async def _compare(self, given: str, gold: str, limits: Limits) -> _Comparison:
        case = {"given": given, "gold": gold}
        answer = await self._workers.ask("compare", case, limits.wall_s, limits.memory_mb)
        if answer.limit:
            return _Comparison(False, answer.limit, answer.detail, answer.seconds)
        if answer.value is None:
            return _Comparison(None, "", answer.detail, answer.seconds)
        agree, detail = answer.value.get("agree"), str(answer.value.get("detail", ""))
        if not isinstance(agree, bool):
            return _Comparison(None, "", f"worker sent {answer.value!r:.80}", answer.seconds)
        return _Comparison(agree, "", detail, answer.seconds)

    def _verdict(
        self, completion: Completion, found: Extraction, comparison: _Comparison, seconds: float
    ) -> Verdict:
        outcome, category, detail = Outcome.FAIL, "", comparison.detail
        no_form = "truncated" if completion.finish_reason == "length" else "no_answer"
        is_accepted = found.method in self._accept
        if found.category:
            category = found.category
        elif comparison.agree is None:
            outcome = Outcome.ERROR
        elif comparison.limit:
            category = comparison.limit if is_accepted else no_form
        elif comparison.agree and is_accepted:
            outcome = Outcome.PASS
        elif is_accepted:
            category = "wrong_answer"
        else:
            category = no_form
            value = "right" if comparison.agree else "wrong"
            detail = f"{value} value in the form {found.method!r}, which is not accepted"
        return Verdict(
            outcome=outcome,
            reward=float(outcome is Outcome.PASS),
            category=category,
            answer=found.answer,
            method=found.method,
            value_correct=bool(comparison.agree),
            seconds=seconds,
            detail=detail,
        )
