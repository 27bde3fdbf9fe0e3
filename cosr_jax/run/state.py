"""The host side of a run's state: everything but device arrays that the future depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.run.convergence import ConvergenceState
from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.types import CellEvidence, FailedSample, Outcome, Plan, RolloutGroup


@dataclasses.dataclass
class RoundTally:
    """What the steps of the current round have added up to."""

    steps: int = 0
    groups: int = 0
    informative_groups: int = 0
    samples: int = 0
    errors: int = 0  # samples that the verifier could not judge
    truncated: int = 0  # samples cut by the length limit
    entropy: float = 0.0  # of the round's last update on samples, in nats per token
    updates_on_samples: int = 0
    #: By domain: samples, and those of them that the verifier could not judge.
    by_domain: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        """Adds one step's judged groups."""
        self.groups += len(groups)
        self.informative_groups += sum(group.is_informative for group in groups)
        for group in groups:
            errors = sum(v.outcome is Outcome.ERROR for v in group.verdicts)
            self.samples += len(group.completions)
            self.errors += errors
            of_domain = self.by_domain.setdefault(group.task.domain, [0, 0])
            of_domain[0] += len(group.completions)
            of_domain[1] += errors
            self.truncated += sum(c.finish_reason == "length" for c in group.completions)

    def share(self, part: int, whole: int) -> float | None:
        """``part / whole``; None when nothing was counted."""
        return part / whole if whole else None

    @property
    def informative_share(self) -> float | None:
        """Groups with unequal rewards, in [0, 1]; None in a round without samples."""
        return self.share(self.informative_groups, self.groups)

    @property
    def error_share(self) -> float:
        """Samples that could not be judged, in [0, 1]."""
        return self.share(self.errors, self.samples) or 0.0


@dataclasses.dataclass
class LoopState:
    """Where the loop stands.  Saved with the device arrays as one step of the checkpoint."""

    step: int = 0  # optimizer steps, skipped updates included
    round: int = 0  # finished rounds
    plan: Plan | None = None  # of the round under way; None between rounds
    algorithm: str = ""  # of the latest update; optimizer moments belong to it
    tally: RoundTally = dataclasses.field(default_factory=RoundTally)
    evidence: list[CellEvidence] = dataclasses.field(default_factory=list)  # since the last plan
    failures: list[FailedSample] = dataclasses.field(default_factory=list)  # likewise, the latest
    convergence: ConvergenceState = dataclasses.field(default_factory=ConvergenceState)
    before: dict[str, ProbeResult] = dataclasses.field(default_factory=dict)  # by test suite
    generated_tokens: int = 0
    wall_s: float = 0.0  # of all sessions up to the save
    status: str = ""  # why the run ended, once it has
    reason: str = ""

    @property
    def score(self) -> float | None:
        """The latest validation accuracy."""
        scores = self.convergence.scores
        return scores[-1] if scores else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        rest = dataclasses.replace(self, failures=[])  # a verdict's outcome is no JSON value
        return {
            **dataclasses.asdict(rest),
            "failures": [failure.to_dict() for failure in self.failures],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopState:
        """Rebuilds the state after a trip through JSON."""
        return cls(
            **{
                **values,
                "plan": None if values["plan"] is None else Plan.from_dict(values["plan"]),
                "tally": RoundTally(**values["tally"]),
                "evidence": [CellEvidence(**evidence) for evidence in values["evidence"]],
                "failures": [FailedSample.from_dict(f) for f in values.get("failures", ())],
                "convergence": ConvergenceState.from_dict(values["convergence"]),
                "before": {k: ProbeResult.from_dict(v) for k, v in values["before"].items()},
            }
        )
