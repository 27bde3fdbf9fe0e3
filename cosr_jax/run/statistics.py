"""Interval estimates for accuracies and for gains on the same tasks.  NumPy only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

#: Two-sided 95 % quantile of the standard normal.
Z95 = 1.959963984540054


class Gain(NamedTuple):
    """A mean change and its two-sided 95 % interval, all in the scores' unit."""

    gain: float
    low: float
    high: float


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a binomial proportion (Wilson, JASA 22, 1927, pp. 209-212).

    Unlike the normal interval it stays in [0, 1] and keeps a width at 0 and at ``n`` successes.

    Args:
      successes: count in [0, n].
      n: trials; 0 tells nothing and gives (0, 1).

    Raises:
      ValueError: ``n`` is negative or ``successes`` is out of [0, n].
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # Rounding may miss the exact ends by one unit in the last place.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def standard_error(rate: float, n: int) -> float:
    """Standard error of an accuracy ``rate`` measured on ``n`` >= 1 tasks."""
    return math.sqrt(rate * (1.0 - rate) / n)


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, resamples: int = 2000, seed: int = 0
) -> Gain:
    """Mean of ``after - before`` with its percentile-bootstrap 95 % interval over tasks.

    Pairing removes the tasks' own difficulty from the noise (Efron and Tibshirani, An Introduction
    to the Bootstrap, 1993, chapter 13).  Resampling n differences with replacement is a multinomial
    draw over the distinct differences, so the cost is ``resamples`` x distinct values, not x n.
    The same arguments always give the same interval.  Where all differences are equal the interval
    is a point: then it says nothing about unseen tasks.

    Args:
      before: scores, bool or float [n]; task i is the same task on both sides.
      after: scores, bool or float [n].
      resamples: bootstrap replicates, >= 1.
      seed: of the resampling.

    Raises:
      ValueError: shapes differ or are not [n] with n >= 1, or a score is not finite.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.shape != new.shape or old.ndim != 1 or old.size == 0:
        raise ValueError(f"scores of shapes {old.shape} and {new.shape} are not pairs")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("a score is not finite")
    values, counts = np.unique(new - old, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        old.size, counts / old.size, size=resamples
    )  # int64 [resamples, distinct]
    low, high = np.quantile(draws @ values / old.size, [0.025, 0.975])
    return Gain(float(np.mean(new - old)), float(low), float(high))
