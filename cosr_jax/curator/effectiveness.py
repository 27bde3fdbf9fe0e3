"""What worked: gains by strategy, and by pairs of strategies, for each kind of weakness.

Gains are changes of validation accuracy, in percentage points, each credited to the round that it
followed, and in a pair to the second of two rounds in a row.  They are observed, not assigned at
random, so they describe a run and prove nothing about the next.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.curator.mastery import beta_quantile

#: Stands for the kind where a round had no weakness to work on.
NO_KIND = "-"


@dataclasses.dataclass(frozen=True)
class Effect:
    """What followed the rounds of one kind."""

    gains: tuple[float, ...]  # percentage points, one for each round
    tokens: int  # of the curator's calls in these rounds
    dollars: float

    @classmethod
    def of(cls, chains: Sequence[Mapping[str, Any]]) -> Effect:
        """From measured rounds' records, see ``Curator.chains``."""
        tokens, dollars = (sum(c["spent"][unit] for c in chains) for unit in ("tokens", "dollars"))
        return cls(tuple(100.0 * chain["gain"] for chain in chains), int(tokens), float(dollars))

    @property
    def gain(self) -> float:
        """The mean."""
        return statistics.fmean(self.gains)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean; None of a single round."""
        return mean_interval(self.gains)

    def per_point(self, amount: float) -> float | None:
        """``amount`` for each point gained; None where nothing was gained in all."""
        total = sum(self.gains)
        return amount / total if total > 0 else None

    def figures(self) -> dict[str, float]:
        """By name; what is not known is left out."""
        values = {
            "gain": self.gain,
            "rounds": float(len(self.gains)),
            "tokens_per_point": self.per_point(self.tokens),
            "dollars_per_point": self.per_point(self.dollars),
        }
        if self.interval:
            values |= dict(zip(("gain_low", "gain_high"), self.interval, strict=True))
        return {name: value for name, value in values.items() if value is not None}


def by_strategy(chains: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Effect]:
    """(strategy, kind of weakness) -> what followed, of the measured rounds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for chain in _measured(chains):
        groups.setdefault((chain["strategy"], _kind(chain)), []).append(chain)
    return {key: Effect.of(groups[key]) for key in sorted(groups)}


def by_pair(chains: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Effect]:
    """(strategy before, strategy, kind of weakness) -> what followed the second of the two."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for one, two in itertools.pairwise(_measured(chains)):
        groups.setdefault((one["strategy"], two["strategy"], _kind(two)), []).append(two)
    return {key: Effect.of(groups[key]) for key in sorted(groups)}


def figures(chains: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For TensorBoard: effect/STRATEGY/KIND/* and effect_after/BEFORE/STRATEGY/KIND/*."""
    groups: dict[str, Effect] = {}
    for strategy, kind in (effects := by_strategy(chains)):
        groups[f"effect/{strategy}/{_named(kind)}"] = effects[strategy, kind]
    for before, strategy, kind in (pairs := by_pair(chains)):
        name = f"effect_after/{before}/{strategy}/{_named(kind)}"
        groups[name] = pairs[before, strategy, kind]
    return {
        f"{group}/{name}": value
        for group, effect in groups.items()
        for name, value in effect.figures().items()
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; None of fewer than two values.

    The quantile of t follows from the Beta distribution's: nu / (nu + t^2) ~ Beta(nu / 2, 1 / 2).
    """
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    x = beta_quantile(0.05, freedom / 2, 0.5)
    half = math.sqrt(freedom * (1 / x - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _measured(chains: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [chain for chain in chains if chain["gain"] is not None]


def _kind(chain: Mapping[str, Any]) -> str:
    return chain["weakness"]["weakness"]["kind"] if chain["weakness"] else NO_KIND


def _named(kind: str) -> str:
    return "none" if kind == NO_KIND else kind
