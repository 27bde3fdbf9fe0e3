"""When to stop: a pure function from one measurement per round to a decision with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cosr_jax.config import ConvergenceConfig

#: One-sided 99.5 % normal quantile of the tests that every round repeats: of the trend, over
#: several windows, and of regression, against the luckiest score so far.  With it, noise over a
#: rise of exactly ``min_effect`` per round stops at most about 5 % of 20-round runs, at 100 as at
#: 200 validation tasks (tests/run/test_convergence.py).
REPEATED_Z = 2.576

#: One-sided 95 % normal quantile of the bound that has to reach the target.
TARGET_Z = 1.645

Status = Literal["", "converged", "stopped", "no_signal"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one round ended with.  ``None``: the round had no such measurement (an SFT round)."""

    step: int  # optimizer steps done
    score: float  # validation accuracy, in [0, 1]
    standard_error: float  # of ``score``
    entropy: float | None = None  # mean token entropy of the samples, in nats
    truncated_share: float | None = None  # completions cut by the length limit, in [0, 1]
    informative_share: float | None = None  # GRPO groups with unequal rewards, in [0, 1]


class Decision(NamedTuple):
    """Whether to stop, as what and why; ``is_best``: the score is the first to be this high."""

    stop: bool
    status: Status
    reason: str
    is_best: bool


@dataclasses.dataclass(frozen=True)
class ConvergenceState:
    """All that the next decision depends on; ``ConvergenceState()`` starts a run."""

    scores: tuple[float, ...] = ()  # one per measurement, oldest first
    standard_errors: tuple[float, ...] = ()
    best: Measurement | None = None
    flat: int = 0  # rounds in a row, up to now, whose trend test found less than the minimum effect
    low_entropy: int = 0  # rounds in a row; rounds without the measurement do not count
    truncated: int = 0
    silent: int = 0  # GRPO rounds in a row without one informative group

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvergenceState:
        """Rebuilds a state from ``to_dict`` after a trip through JSON."""
        best = values["best"]
        return cls(
            **{
                **values,
                "scores": tuple(values["scores"]),
                "standard_errors": tuple(values["standard_errors"]),
                "best": None if best is None else Measurement(**best),
            }
        )


class Trend(NamedTuple):
    """Least-squares rise per round over the last ``rounds`` measurements, and its upper bound."""

    rounds: int
    slope: float
    upper: float


def flattest_trend(
    scores: Sequence[float], standard_errors: Sequence[float], window: int
) -> Trend | None:
    """Of all stretches of at least ``window`` measurements up to now, the one of lowest bound.

    The bound comes from the measurements' own standard errors, not from the residuals: six points
    are too few to estimate noise from.  A long plateau is recognised by its long stretch, so few
    validation tasks cost rounds instead of making detection impossible; an early rise cannot hide a
    plateau, because stretches that begin after it are looked at too.

    Returns:
      None while there are fewer than ``window`` measurements.
    """
    trends = []
    for rounds in range(window, len(scores) + 1):
        time = np.arange(rounds) - (rounds - 1) / 2
        spread = float(time @ time)
        slope = float(time @ np.asarray(scores[-rounds:])) / spread
        noise = np.square(standard_errors[-rounds:]).mean() / spread
        trends.append(Trend(rounds, slope, slope + REPEATED_Z * math.sqrt(noise)))
    return min(trends, key=lambda trend: trend.upper, default=None)


def update(
    config: ConvergenceConfig, state: ConvergenceState, measured: Measurement
) -> tuple[ConvergenceState, Decision]:
    """Takes in one round's measurement and decides.

    A run stops, in this order of precedence, when
      target: the score's lower bound reaches ``config.target``, or every task is solved (then
        there is nothing left to measure);
      regression: the score is more than ``max_regression`` under the best one, beyond noise;
      collapse: entropy or truncation is out of bounds for ``patience`` measured rounds in a row;
      no signal: ``patience`` GRPO rounds in a row had no informative group;
      plateau: for ``patience`` rounds in a row the trend's upper bound is under ``min_effect``.

    Args:
      config: thresholds.
      state: what ``update`` returned before, or ``ConvergenceState()``.
      measured: the baseline before training, then one measurement after every round.

    Raises:
      ValueError: the score or its standard error is not a finite number in [0, 1].
    """
    for name in ("score", "standard_error"):
        if not 0.0 <= getattr(measured, name) <= 1.0:
            raise ValueError(f"{name} {getattr(measured, name)} is not in [0, 1]")
    best = state.best
    is_best = best is None or measured.score > best.score
    scores = (*state.scores, measured.score)
    errors = (*state.standard_errors, measured.standard_error)
    trend = flattest_trend(scores, errors, config.window)
    is_flat = trend is not None and trend.upper < config.min_effect
    state = ConvergenceState(
        scores=scores,
        standard_errors=errors,
        best=measured if is_best else best,
        flat=state.flat + 1 if is_flat else 0,
        low_entropy=_in_a_row(
            state.low_entropy, measured.entropy, lambda x: x < config.min_entropy
        ),
        truncated=_in_a_row(
            state.truncated, measured.truncated_share, lambda x: x > config.max_truncated
        ),
        silent=_in_a_row(state.silent, measured.informative_share, lambda x: x == 0.0),
    )
    status, reason = _verdict(config, state, measured, trend)
    return state, Decision(status != "", status, reason, is_best)


def _in_a_row(count: int, value: float | None, is_bad: Callable[[float], bool]) -> int:
    if value is None:
        return count
    return count + 1 if is_bad(value) else 0


def _verdict(
    config: ConvergenceConfig,
    state: ConvergenceState,
    measured: Measurement,
    trend: Trend | None,
) -> tuple[Status, str]:
    score, error = measured.score, measured.standard_error
    if score == 1.0:
        return "converged", "every validation task is solved"
    if score - TARGET_Z * error >= config.target:
        return "converged", (
            f"validation accuracy {score:.3f} (95 % lower bound {score - TARGET_Z * error:.3f}) "
            f"reached the target {config.target:g}"
        )
    assert state.best is not None
    drop = state.best.score - score
    sure_drop = drop - REPEATED_Z * math.hypot(error, state.best.standard_error)
    if sure_drop > config.max_regression:
        return "stopped", (
            f"validation accuracy fell from {state.best.score:.3f} at step {state.best.step} to "
            f"{score:.3f}: by at least {sure_drop:.3f} beyond noise, where "
            f"{config.max_regression:g} is allowed"
        )
    if state.low_entropy >= config.patience:
        return "stopped", (
            f"the samples' entropy collapsed: under {config.min_entropy:g} nats per token for "
            f"{state.low_entropy} rounds in a row"
        )
    if state.truncated >= config.patience:
        return "stopped", (
            f"completions run into the length limit: more than {config.max_truncated:.0%} of them "
            f"for {state.truncated} rounds in a row"
        )
    if state.silent >= config.patience:
        return "no_signal", (
            f"no group of samples had both right and wrong answers in {state.silent} GRPO rounds "
            "in a row, so there was nothing to learn from"
        )
    if state.flat >= config.patience:
        assert trend is not None
        return "converged", (
            f"plateau: over the last {trend.rounds} measurements validation accuracy changed by "
            f"{trend.slope:+.4f} per round (upper bound {trend.upper:+.4f}), less than the "
            f"{config.min_effect:g} that counts, for {state.flat} rounds in a row"
        )
    return "", ""
