"""Is a claimed weakness true?  It has to show again, on fresh answers, more often than elsewhere.

A claim names a skill and a kind of failure and cites failing answers.  It is accepted if

1. it cites a failure of its skill that was really in the batch;
2. on fresh tasks of the cells that it cites, the student fails in that way more often than on
   fresh tasks of skills of which nobody claims the same: one-sided Fisher's exact test, with
   p-values corrected for the number of claims by Holm's method, so that the chance of accepting
   any untrue claim of a round is at most ``alpha``; a claim that several models share, who do not
   know of each other, is tested at ``alpha`` by itself;
3. it fails in that way more often than a mastered cell may fail (1 - ``zone_high``), so that a
   healthy student has no weakness, however many samples tell its good skills apart.

Where there is nothing to compare with, as in a run on a single skill, 2. compares with the rate of
3. by the exact binomial test.  Everything else is rejected and counts as hallucinated.

What the verifier cannot tell apart is not told apart here: ``knowledge``, ``logic`` and
``arithmetic`` all show as wrong values or failing programs.  Answers to one task are correlated;
so each fresh task is answered once, unless a cell holds too few tasks.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.curator.analysis import Weakness, symptom
from cosr_jax.protocols import Lab
from cosr_jax.types import FailedSample, Outcome, RolloutGroup, Verdict

_NO_FORM = frozenset({"no_code", "no_answer", "syntax_error", "missing_entry_point"})
_CUT = frozenset({"truncated", "output_limit"})
_BROKEN = frozenset({"runtime_error", "timeout", "memory_limit", "crash"})
#: Failure categories in which a weakness of each kind shows.
_CATEGORIES: Mapping[str, frozenset[str]] = {
    "format": _NO_FORM,
    "incomplete": _CUT,
    "arithmetic": frozenset({"wrong_answer"}),
    "logic": frozenset({"wrong_answer"}) | _BROKEN,
    "knowledge": frozenset({"wrong_answer", "missing_import", "forbidden"}) | _BROKEN,
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a claim is worth."""

    weakness: Weakness
    is_accepted: bool
    reason: str  # in words with numbers
    cells: tuple[str, ...] = ()  # where it was tested
    failed: int = 0  # fresh answers that fail in the claimed way
    samples: int = 0
    base_failed: int = 0  # the same elsewhere
    base_samples: int = 0
    p_value: float = 1.0  # corrected for the number of claims, unless the claim is shared

    @property
    def rate(self) -> float:
        """Share of fresh answers that fail in the claimed way."""
        return self.failed / self.samples if self.samples else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values, for logs."""
        weakness, cells = self.weakness.to_dict(), list(self.cells)
        return {**dataclasses.asdict(self), "weakness": weakness, "cells": cells}


def audit(
    claims: Sequence[Weakness],
    failures: Sequence[FailedSample],
    cells: Sequence[str],
    lab: Lab,
    samples: int,
    alpha: float,
    tolerated: float,
) -> tuple[Finding, ...]:
    """Tests each claim; one finding for each, in order.

    Args:
      claims: of the analyst.
      failures: the batch that it was about.
      cells: the whole grid.
      lab: draws fresh tasks and has them answered.
      samples: fresh answers for each claim, and for the comparison.
      alpha: chance of accepting any untrue claim of one model alone, and each that is shared.
      tolerated: rate of failure that is no weakness.
    """
    findings: dict[int, Finding] = {}
    tested: dict[int, tuple[str, ...]] = {}  # claim -> its cells
    seen: set[tuple[str, str]] = set()
    for number, claim in enumerate(claims):
        where = _cited_cells(claim, failures, cells)
        if not where:
            why = "it cites no failure of its skill"
            findings[number] = Finding(claim, False, why)
        elif (claim.skill, symptom(claim.kind)) in seen:
            why = "it was claimed before, or the verifier cannot tell it from one that was"
            findings[number] = Finding(claim, False, why)
        else:
            seen.add((claim.skill, symptom(claim.kind)))
            tested[number] = where
    answers = _fresh(tested, claims, cells, lab, samples)
    for number, where in tested.items():
        findings[number] = _compare(claims[number], where, seen, answers, tolerated)
    order = sorted(tested, key=lambda number: findings[number].p_value)
    adjusted = holm([findings[number].p_value for number in order])
    for number, p_value in zip(order, adjusted, strict=True):
        if claims[number].is_shared:
            p_value = findings[number].p_value
        findings[number] = _decide(findings[number], p_value, alpha, tolerated)
    return tuple(findings[number] for number in range(len(claims)))


def shows(kind: str, verdict: Verdict) -> bool:
    """Whether a wrong answer fails in the way that a weakness of ``kind`` makes it fail."""
    if verdict.outcome is not Outcome.FAIL:
        return False
    if verdict.value_correct:  # all that is wrong is the form
        return kind == "format"
    return verdict.category in _CATEGORIES[kind]


def fisher_exact(failed: int, samples: int, base_failed: int, base_samples: int) -> float:
    """One-sided p-value of "the first rate is no higher than the second".

    The probability, with both margins fixed, of ``failed`` or more of the failures falling to the
    first sample (hypergeometric).
    """
    total, failures = samples + base_samples, failed + base_failed
    most = min(samples, failures)
    ways = sum(
        math.comb(failures, k) * math.comb(total - failures, samples - k)
        for k in range(failed, most + 1)
    )
    return ways / math.comb(total, samples)


def binomial_tail(failed: int, samples: int, rate: float) -> float:
    """Probability of ``failed`` or more of ``samples`` failures at ``rate``."""
    return math.fsum(
        math.comb(samples, k) * rate**k * (1.0 - rate) ** (samples - k)
        for k in range(failed, samples + 1)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of ``p_values``, which ascend.

    Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted, highest = [], 0.0
    for rank, p_value in enumerate(p_values):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_value))
        adjusted.append(highest)
    return adjusted


def _cited_cells(
    claim: Weakness, failures: Sequence[FailedSample], cells: Sequence[str]
) -> tuple[str, ...]:
    """Cells of the failures of its skill that a claim cites, in the grid's order."""
    ids = set(claim.evidence_task_ids)
    cited = {
        failure.task.cell
        for failure in failures
        if failure.task.skill == claim.skill and failure.task.task_id in ids
    }
    return tuple(cell for cell in cells if cell in cited)


def _fresh(
    tested: Mapping[int, tuple[str, ...]],
    claims: Sequence[Weakness],
    cells: Sequence[str],
    lab: Lab,
    samples: int,
) -> dict[str, list[Verdict]]:
    """Verdicts on fresh answers by cell: of the claims' cells, and of cells to compare with."""
    if not tested:
        return {}
    wanted: collections.Counter[str] = collections.Counter()
    for where in tested.values():
        for cell in where:
            wanted[cell] = max(wanted[cell], math.ceil(samples / len(where)))
    claimed = {claims[number].skill for number in tested}
    others = [cell for cell in cells if _skill(cell) not in claimed]
    levels = {_level(cell) for cell in wanted}
    # Harder tasks fail more often, so like is compared with like where there is any.
    others = [cell for cell in others if _level(cell) in levels] or others
    for cell in others[:: math.ceil(len(others) / samples) or 1]:
        wanted[cell] = math.ceil(samples / min(len(others), samples))
    answers: dict[str, list[Verdict]] = {}
    once: list[Any] = []
    for cell, count in wanted.items():
        tasks = lab.draw(cell, count)
        answers[cell] = []
        if len(tasks) == count:
            once += tasks
        elif tasks:
            generations = math.ceil(count / len(tasks))
            _collect(lab.sample(tasks, generations), answers)
    _collect(lab.sample(once, 1), answers)
    return answers


def _collect(groups: Sequence[RolloutGroup], answers: dict[str, list[Verdict]]) -> None:
    for group in groups:
        judged = [v for v in group.verdicts if v.outcome is not Outcome.ERROR]
        answers[group.task.cell] += judged


def _compare(
    claim: Weakness,
    where: tuple[str, ...],
    seen: set[tuple[str, str]],
    answers: Mapping[str, Sequence[Verdict]],
    tolerated: float,
) -> Finding:
    """The claim's counts and its uncorrected p-value."""
    shown = symptom(claim.kind)
    here = [verdict for cell in where for verdict in answers[cell]]
    elsewhere = [
        verdict
        for cell, verdicts in answers.items()
        if (_skill(cell), shown) not in seen
        for verdict in verdicts
    ]
    failed = sum(shows(claim.kind, verdict) for verdict in here)
    base = sum(shows(claim.kind, verdict) for verdict in elsewhere)
    if elsewhere:
        p_value = fisher_exact(failed, len(here), base, len(elsewhere))
    else:
        p_value = binomial_tail(failed, len(here), tolerated)
    return Finding(claim, False, "", where, failed, len(here), base, len(elsewhere), p_value)


def _decide(finding: Finding, p_value: float, alpha: float, tolerated: float) -> Finding:
    elsewhere = f"{finding.base_failed} of {finding.base_samples} elsewhere"
    numbers = (
        f"{finding.failed} of {finding.samples} fresh answers fail so, against "
        f"{elsewhere if finding.base_samples else f'{tolerated:.0%} that are tolerated'}, "
        f"p {p_value:.2g}"
    )
    is_accepted = p_value <= alpha and finding.rate > tolerated
    return dataclasses.replace(
        finding,
        is_accepted=is_accepted,
        reason=numbers if is_accepted else f"it does not reproduce: {numbers}",
        p_value=p_value,
    )


def _skill(cell: str) -> str:
    return cell.rpartition("/")[0]


def _level(cell: str) -> str:
    return cell.rpartition("/")[2]
