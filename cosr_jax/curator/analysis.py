"""Why does the student fail?  A model looks at a sample of its wrong answers and makes claims."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cosr_jax.curator import prompts
from cosr_jax.curator.client import Client
from cosr_jax.curator.consult import consult
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.quoting import quoted
from cosr_jax.curator.schemas import Context
from cosr_jax.types import CellEvidence, Completion, FailedSample

#: Characters of a rationale that are kept: it goes into prompts, logs and checkpoints.
_RATIONALE = 600


@dataclasses.dataclass(frozen=True)
class Weakness:
    """A claim about the student, in words of the model; see ``audit`` for what it is worth."""

    skill: str
    kind: str  # of ``schemas.KINDS_OF_WEAKNESS``
    evidence_task_ids: tuple[str, ...]
    severity: float  # in [0, 1], as the model sees it
    rationale: str  # untrusted

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Weakness:
        """From a canonical item of the schema "analysis"."""
        ids, rationale = tuple(item["evidence_task_ids"]), quoted(item["rationale"], _RATIONALE)
        return cls(**{**item, "evidence_task_ids": ids, "rationale": rationale})

    def to_dict(self) -> dict[str, Any]:
        """As the canonical item."""
        return {**dataclasses.asdict(self), "evidence_task_ids": list(self.evidence_task_ids)}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What came of an analysis."""

    weaknesses: tuple[Weakness, ...]  # claims, the most severe first
    dropped: Mapping[str, int]  # claims that the parser could not keep, by reason
    unknown_ids: int  # ids cited that nobody has seen


def analyse(
    client: Client,
    failures: Sequence[FailedSample],
    rates: Sequence[CellEvidence],
    skills: Collection[str],
    max_claims: int,
    max_tokens: int,
    seed: int,
) -> Analysis:
    """Asks an analyst for the weaknesses behind ``failures``; without any there is none.

    Args:
      client: asks.
      failures: of training samples.
      rates: successes by cell.
      skills: what claims may be about.
      max_claims: claims that are kept.
      max_tokens: longest prompt, estimated.
      seed: of the sample of failures that is shown.

    Raises:
      CallError: no model gave a usable answer.
    """
    if not failures:
        return Analysis((), {}, 0)
    context = Context(known_skills=skills, max_items=max_claims)
    build = functools.partial(_build, [as_failure(f) for f in failures], rates, context, seed)
    result = consult(client, build, max_tokens)
    assert result.value is not None, "the client accepts no answer without a value"
    claims = [Weakness.of(item) for item in result.value["weaknesses"]]
    claims.sort(key=lambda claim: -claim.severity)
    return Analysis(tuple(claims), result.reasons, len(result.dropped_ids))


def _build(
    failures: Sequence[Failure],
    rates: Sequence[CellEvidence],
    context: Context,
    seed: int,
    max_tokens: int,
) -> prompts.Prompt:
    return prompts.analyst(failures, rates, context, max_tokens, seed)


def as_failure(sample: FailedSample) -> Failure:
    """The record of a failed sample that prompts are made of."""
    return Failure.of(sample.task, Completion((), (), sample.text, "stop"), sample.verdict)
