"""What the student can do, cell by cell: Beta posteriors over counts that fade with time.

The counts behind a posterior are multiplied by ``discount`` each round, so that a moving student
is tracked with a memory of about 1 / (1 - discount) rounds (discounted Bernoulli estimation, as
in Garivier & Moulines, arXiv:0805.3415).  Where fresh samples contradict the memory (a format
drill can move a rate from 5 % to 95 % in one round) the memory is dropped at once.

Samples of one task are correlated, so the intervals are somewhat too narrow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from cosr_jax.types import CellEvidence

#: Jeffreys' prior, Beta(1/2, 1/2): cells are often all right or all wrong.
PRIOR = 0.5
#: Probability mass of every interval of this room.
INTERVAL = 0.9


@dataclasses.dataclass(frozen=True)
class Beta:
    """A Beta(a, b) belief about a rate in [0, 1]."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    def interval(self, mass: float = INTERVAL) -> tuple[float, float]:
        """The central interval that holds ``mass`` of the probability."""
        tail = (1.0 - mass) / 2.0
        return beta_quantile(tail, self.a, self.b), beta_quantile(1.0 - tail, self.a, self.b)


@dataclasses.dataclass(frozen=True)
class CellMastery:
    """Faded counts of one cell; the rates are their Beta posteriors."""

    samples: float = 0.0
    passed: float = 0.0
    value_correct: float = 0.0
    formatted: float = 0.0
    groups: float = 0.0
    informative_groups: float = 0.0

    @property
    def pass_rate(self) -> Beta:
        """Strict passes: right value in the accepted form."""
        return _posterior(self.passed, self.samples)

    @property
    def value_rate(self) -> Beta:
        """Right values, the form forgiven."""
        return _posterior(self.value_correct, self.samples)

    @property
    def format_rate(self) -> Beta:
        """Answers in the accepted form, right or wrong."""
        return _posterior(self.formatted, self.samples)

    @property
    def group_rate(self) -> Beta:
        """Groups with differing rewards."""
        return _posterior(self.informative_groups, self.groups)

    def faded(self, discount: float) -> CellMastery:
        """The same belief after one more round, its counts scaled by ``discount``."""
        return CellMastery(*(discount * count for count in dataclasses.astuple(self)))

    def observe(self, evidence: CellEvidence) -> CellMastery:
        """Adds fresh counts; drops the old ones where a fresh rate contradicts them.

        They contradict when the old and the fresh interval of some per-sample rate are disjoint.

        Raises:
          ValueError: a count is negative or larger than its total.
        """
        fresh = _checked(evidence)
        old = CellMastery() if _contradicts(self, fresh) else self
        pairs = zip(dataclasses.astuple(old), dataclasses.astuple(fresh), strict=True)
        return CellMastery(*(a + b for a, b in pairs))

    def to_dict(self) -> dict[str, float]:
        """As JSON-serialisable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellMastery:
        """The inverse of ``to_dict``."""
        return cls(**values)


def _posterior(successes: float, trials: float) -> Beta:
    # max: fading rounds successes and trials separately, which can leave -1e-17 failures.
    return Beta(PRIOR + successes, PRIOR + max(trials - successes, 0.0))


def _checked(evidence: CellEvidence) -> CellMastery:
    e = evidence
    for name, part, whole in (
        ("passed", e.passed, e.samples),
        ("value_correct", e.value_correct, e.samples),
        ("formatted", e.formatted, e.samples),
        ("informative_groups", e.informative_groups, e.groups),
    ):
        if not 0 <= part <= whole:
            raise ValueError(f"evidence of {e.cell}: {name} is {part}, out of {whole}")
    return CellMastery(
        e.samples, e.passed, e.value_correct, e.formatted, e.groups, e.informative_groups
    )


def _contradicts(old: CellMastery, fresh: CellMastery) -> bool:
    for rate in ("pass_rate", "value_rate", "format_rate"):
        old_low, old_high = getattr(old, rate).interval()
        low, high = getattr(fresh, rate).interval()
        if low > old_high or high < old_low:
            return True
    return False


def log_beta(a: float, b: float) -> float:
    """ln B(a, b) for a, b > 0."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete Beta function I_x(a, b), by its continued fraction.

    DLMF 8.17.22 evaluated by Lentz's method, on the side of the mean where it converges fast.
    """
    if x <= 0.0 or x >= 1.0:
        return float(x > 0.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d, tiny)
            c = _away_from_zero(1.0 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-13:
            return front * fraction
    raise ArithmeticError(f"I_{x}({a}, {b}) did not converge")


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


@functools.lru_cache(maxsize=4096)
def beta_quantile(q: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = ``q``, by bisection to about 1e-12."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if beta_cdf(middle, a, b) < q else (low, middle)
    return (low + high) / 2.0
