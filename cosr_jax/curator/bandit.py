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
    state: BanditState,
    context: str,
    eligible: Sequence[str],
    exploration: float,
    prior: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Upper confidence bound of each eligible arm; infinite for one that was never pulled.

    ``prior`` counts for an arm's value like so many pulls of reward 1, and not as exploration:
    however often it is given, measured rewards outweigh it after as many pulls.
    """
    prior = prior or {}
    arms = state.get(context, {})
    pulls = sum(arm.pulls for arm in arms.values())  # t: all pulls in the context

    def bound(name: str) -> float:
        if name not in arms:
            return math.inf
        arm, trust = arms[name], prior.get(name, 0.0)
        value = (arm.value * arm.pulls + trust) / (arm.pulls + trust)
        return value + exploration * math.sqrt(math.log(pulls) / arm.pulls)

    return {name: bound(name) for name in eligible}


def select(
    state: BanditState,
    context: str,
    eligible: Sequence[str],
    exploration: float,
    prior: Mapping[str, float] | None = None,
) -> str:
    """argmax_s Q(s, c) + exploration * sqrt(ln t / N(s, c)) over ``eligible``.

    Arms never pulled in the context come first; ties go to the arm with the larger ``prior`` (see
    ``bounds``), then to the earlier one in ``eligible``.

    Raises:
      ValueError: no arm is eligible.
    """
    if not eligible:
        raise ValueError(f"no arm is eligible in context {context!r}")
    prior = prior or {}
    ucb = bounds(state, context, eligible, exploration, prior)
    return max(eligible, key=lambda name: (ucb[name], prior.get(name, 0.0)))


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
