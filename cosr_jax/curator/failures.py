"""The student's failures as the curator may see them, and which of them it sees first."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable

from cosr_jax.types import Completion, Task, Verdict


@dataclasses.dataclass(frozen=True)
class Failure:
    """One wrong answer of the student's."""

    task_id: str
    skill: str
    difficulty: float  # in [0, 1]
    prompt: str
    expected: str  # canonical answer; "" where tests decide
    response: str  # the student's text, untrusted
    category: str  # why the verifier failed it, of ``types.CATEGORIES``
    detail: str  # the verifier's words; they may quote the student, so untrusted

    @classmethod
    def of(cls, task: Task, completion: Completion, verdict: Verdict) -> Failure:
        """The record of a failed completion."""
        return cls(
            task_id=task.task_id,
            skill=task.skill,
            difficulty=task.difficulty,
            prompt=task.prompt,
            expected=task.answer,
            response=completion.text,
            category=verdict.category,
            detail=verdict.detail,
        )

    @property
    def stratum(self) -> tuple[str, str]:
        """Failures of one skill that failed in one way."""
        return self.skill, self.category


def stratified(failures: Iterable[Failure], seed: int) -> list[Failure]:
    """All failures, in an order of which any beginning is a good sample.

    Strata take turns, the largest first, so that a rare kind of failure is not crowded out by a
    common one.  Within a stratum tasks come in an order drawn by ``seed``, and each task once
    before any comes twice.  The order does not depend on the order of ``failures``.
    """
    strata: dict[tuple[str, str], list[Failure]] = collections.defaultdict(list)
    for failure in sorted(set(failures), key=lambda f: _draw(f, seed)):
        strata[failure.stratum].append(failure)
    turns = [_by_repeat(strata[key]) for key in sorted(strata, key=lambda k: (-len(strata[k]), k))]
    rows = itertools.zip_longest(*turns)
    return [failure for row in rows for failure in row if failure is not None]


def counts(failures: Iterable[Failure]) -> list[tuple[tuple[str, str], int]]:
    """Strata with their sizes, the largest first."""
    sizes = collections.Counter(failure.stratum for failure in failures)
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _draw(failure: Failure, seed: int) -> str:
    text = f"{seed}\n{dataclasses.astuple(failure)}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _by_repeat(failures: list[Failure]) -> list[Failure]:
    """The same failures, the first of each task before the second of any (a stable sort)."""
    seen: collections.Counter[str] = collections.Counter()
    numbered = []
    for failure in failures:
        numbered.append((seen[failure.task_id], failure))
        seen[failure.task_id] += 1
    return [failure for _, failure in sorted(numbered, key=lambda pair: pair[0])]
