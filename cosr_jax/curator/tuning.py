"""How hard to train: at most one bounded change of a hyper-parameter, on trial, for one round.

A rule looks at the measurements before a round of GRPO and proposes at most one change:

  kl_up       validation fell: hold the student nearer to the reference
  kl_down     rounds in a row gained nothing: let it go further
  group_up    few groups are expected to be mixed: larger ones are mixed more often
  group_down  nearly all groups are: smaller ones, of more tasks, for the same number of samples

A change holds for its round and is taken back by itself: every plan starts from config.  Whether it
is ordered when its rule speaks again is decided on gains, by a bandit with two arms for each rule,
the change and leaving things alone; so after a change that was followed by a loss the config's own
setting has the next turn, and the better of both the turns after that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cosr_jax.config import CuratorConfig
from cosr_jax.curator import bandit
from cosr_jax.types import Plan

#: The arm that changes nothing.
AS_CONFIGURED = "as_configured"

#: Rounds in a row without a gain after which the KL may be at fault.
_STUCK_ROUNDS = 2
#: Expected shares of mixed groups under which they are too small, and over which too large.
_FEW_MIXED, _NEARLY_ALL_MIXED = 0.5, 0.9


@dataclasses.dataclass(frozen=True)
class Situation:
    """What the rules look at."""

    group_size: int  # as configured
    has_kl: bool  # whether there is a KL to scale
    has_fallen: bool  # validation accuracy is clearly under its best
    gains: Sequence[float | None]  # of all rounds so far
    informative: float  # expected share of mixed groups at the configured size


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of one setting."""

    name: str
    reason: str
    kl_scale: float = 1.0
    group_size: int = 0  # 0: as configured

    def applied(self, plan: Plan) -> Plan:
        """``plan`` with the change, which its reason tells."""
        return dataclasses.replace(
            plan,
            kl_scale=self.kl_scale,
            group_size=self.group_size,
            reason=f"{plan.reason}; for this round {self.reason}",
        )


def propose(config: CuratorConfig, now: Situation) -> Change | None:
    """The change that the measurements call for, within the configured ranges."""
    if now.has_kl and now.has_fallen and config.kl_high > 1.0:
        return Change(
            "kl_up",
            f"the KL counts {config.kl_high:g} times, as validation has fallen",
            kl_scale=config.kl_high,
        )
    last = now.gains[-_STUCK_ROUNDS:]
    is_stuck = len(last) == _STUCK_ROUNDS and all(gain is not None and gain <= 0 for gain in last)
    if now.has_kl and is_stuck and not now.has_fallen and config.kl_low < 1.0:
        return Change(
            "kl_down",
            f"the KL counts {config.kl_low:g} times, as {_STUCK_ROUNDS} rounds gained nothing",
            kl_scale=config.kl_low,
        )
    share = f"a share of {now.informative:.2f} informative groups is expected"
    if config.group_high > now.group_size and now.informative < _FEW_MIXED:
        return Change(
            "group_up",
            f"groups have {config.group_high} samples instead of {now.group_size}, as {share}",
            group_size=config.group_high,
        )
    if 0 < config.group_low < now.group_size and now.informative > _NEARLY_ALL_MIXED:
        return Change(
            "group_down",
            f"groups have {config.group_low} samples instead of {now.group_size}, as {share}",
            group_size=config.group_low,
        )
    return None


def is_ordered(state: bandit.BanditState, change: Change, exploration: float) -> bool:
    """Whether measured gains speak for the change; an untried one is tried."""
    arms = (change.name, AS_CONFIGURED)
    return bandit.select(state, change.name, arms, exploration) == change.name
