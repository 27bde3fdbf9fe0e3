"""Contextual upper confidence bounds over strategy arms: UCB1 kept separately for each context.

Auer, Cesa-Bianchi & Fischer (2002), "Finite-time Analysis of the Multiarmed Bandit Problem",
with rewards in [0, 1] and the exploration factor as a parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is known of one arm in one context."""

    pulls: int  # N(s, c), at least 1
    value: float  # Q(s, c), the mean reward


#: context -> strategy -> what is known; arms never pulled are absent.  Treated as immutable.
BanditState = Mapping[str, Mapping[str, Arm]]


def bounds(
    state: BanditState, context: str, eligible: Sequence[str], exploration: float
) -> dict[str, float]:
    """Upper confidence bound of each eligible arm; infinite for one that was never pulled."""
    arms = state.get(context, {})
    pulls = sum(arm.pulls for arm in arms.values())  # t: all pulls in the context
    return {
        name: arms[name].value + exploration * math.sqrt(math.log(pulls) / arms[name].pulls)
        if name in arms
        else math.inf
        for name in eligible
    }


def select(state: BanditState, context: str, eligible: Sequence[str], exploration: float) -> str:
    """argmax_s Q(s, c) + exploration * sqrt(ln t / N(s, c)) over ``eligible``.

    Arms never pulled in the context come first; ties go to the earlier one in ``eligible``.

    Raises:
      ValueError: no arm is eligible.
    """
    if not eligible:
        raise ValueError(f"no arm is eligible in context {context!r}")
    ucb = bounds(state, context, eligible, exploration)
    return max(eligible, key=ucb.__getitem__)


def update(state: BanditState, context: str, arm: str, reward: float) -> BanditState:
    """The state after ``arm`` earned ``reward`` (finite, nominally in [0, 1]) in ``context``.

    Raises:
      ValueError: the reward is not finite.
    """
    if not math.isfinite(reward):
        raise ValueError(f"reward of {arm!r} in context {context!r} is {reward}")
    arms = state.get(context, {})
    old = arms.get(arm, Arm(0, 0.0))
    pulls = old.pulls + 1
    new = Arm(pulls, old.value + (reward - old.value) / pulls)
    return {**state, context: {**arms, arm: new}}


def to_dict(state: BanditState) -> dict[str, Any]:
    """As JSON-serialisable values; floats survive JSON bit for bit."""
    return {
        context: {name: dataclasses.asdict(arm) for name, arm in arms.items()}
        for context, arms in state.items()
    }


def from_dict(values: Mapping[str, Any]) -> BanditState:
    """The inverse of ``to_dict``."""
    return {
        context: {name: Arm(**arm) for name, arm in arms.items()}
        for context, arms in values.items()
    }
