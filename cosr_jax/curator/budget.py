"""What the curator may cost: HTTP requests, tokens and money, for a run and for a round.

A request is checked before it is sent, against the most that it can cost, and that much is set
aside; when its usage is known the difference goes back.  So requests sent together never spend
more than there is, as long as the server keeps to ``max_tokens``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.calls import Charge


class Room(enum.Enum):
    """Whether a request may be sent."""

    YES = "yes"
    LATER = "later"  # once requests under way turn out to have cost less than was set aside
    NO = "no"


class Budget:
    """Charges against limits; a limit of 0 is none."""

    def __init__(self, config: CuratorLlmConfig):
        self._limits: dict[tuple[str, str], int] = {}
        for period in ("run", "round"):
            for unit in ("calls", "tokens"):
                self._limits[period, unit] = getattr(config, f"{unit}_per_{period}")
            dollars = getattr(config, f"dollars_per_{period}")
            self._limits[period, "picodollars"] = round(dollars * 1e12)
        self._spent = {"run": Charge(), "round": Charge()}
        self._reserved = Charge()
        self._round: int | None = None

    @property
    def spent_in_run(self) -> Charge:
        return self._spent["run"]

    @property
    def spent_in_round(self) -> Charge:
        return self._spent["round"]

    def start_round(self, number: int) -> None:
        """Begins round ``number``; a round resumed goes on with what it has spent."""
        if number != self._round:
            self._round = number
            self._spent["round"] = Charge()

    def room(self, worst: Charge) -> tuple[Room, str]:
        """Whether ``worst`` fits, and otherwise the limit that it breaks, e.g. "tokens_per_run"."""
        broken = self._broken(worst)
        if broken:
            return Room.NO, broken
        broken = self._broken(worst + self._reserved)
        return (Room.LATER, broken) if broken else (Room.YES, "")

    def _broken(self, more: Charge) -> str:
        for (period, unit), limit in self._limits.items():
            if limit and getattr(self._spent[period], unit) + getattr(more, unit) > limit:
                return f"{'dollars' if unit == 'picodollars' else unit}_per_{period}"
        return ""

    def reserve(self, worst: Charge) -> None:
        """Sets ``worst`` aside.

        Raises:
          ValueError: there is no room for it.
        """
        room, broken = self.room(worst)
        if room is not Room.YES:
            raise ValueError(f"no room for {worst} within {broken}")
        self._reserved += worst

    def settle(self, reserved: Charge, actual: Charge) -> None:
        """Gives back what was set aside for a request and charges what it cost."""
        self._reserved -= reserved
        self.charge(actual)

    def charge(self, actual: Charge) -> None:
        """Charges what a request cost that nothing was set aside for, e.g. a replayed one."""
        self._spent = {period: spent + actual for period, spent in self._spent.items()}

    def state_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values.  Requests under way are not part of it."""
        spent = {period: dataclasses.asdict(charge) for period, charge in self._spent.items()}
        return {"spent": spent, "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        self._spent = {period: Charge(**state["spent"][period]) for period in ("run", "round")}
        self._round = state["round"]
