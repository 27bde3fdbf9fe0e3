"""A circuit breaker: a server that keeps failing is left alone, then tested by one request.

Closed until ``failures`` requests in a row fail; open, refusing all, for ``cooldown_s`` seconds;
then half open: one request, the probe, is let through, and its success closes the breaker while
its failure opens it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Permit:
    """Leave to send one request; give it back with ``Breaker.settle``, whatever happens."""

    is_probe: bool


class Breaker:
    """One server's breaker.  Times are seconds of any one monotonic clock.

    Args:
      failures: failures in a row that open it.
      cooldown_s: how long it stays open.
    """

    def __init__(self, failures: int, cooldown_s: float):
        self._limit, self._cooldown_s = failures, cooldown_s
        self._in_a_row = 0
        self._open_until: float | None = None  # None: closed
        self._is_probing = False

    def state(self, now: float) -> Literal["closed", "open", "half_open"]:
        """What the next request meets."""
        if self._open_until is None:
            return "closed"
        return "half_open" if now >= self._open_until and not self._is_probing else "open"

    def admit(self, now: float) -> Permit | None:
        """Leave for one request, or None."""
        state = self.state(now)
        if state == "open":
            return None
        self._is_probing = state == "half_open"
        return Permit(self._is_probing)

    def settle(self, permit: Permit, is_healthy: bool | None, now: float) -> bool:
        """Takes the outcome of an admitted request; returns whether the breaker opened by it.

        ``is_healthy`` None means that nothing was learnt, because we gave the request up ourselves.
        """
        if permit.is_probe:
            self._is_probing = False
        if is_healthy:
            self._in_a_row, self._open_until = 0, None
            return False
        if is_healthy is None:
            return False
        if self._open_until is not None and not permit.is_probe:
            return False  # sent before the breaker opened: old news
        self._in_a_row += 1
        if permit.is_probe or self._in_a_row >= self._limit:
            self._open_until = now + self._cooldown_s
            return True
        return False

    def state_dict(self, now: float) -> dict[str, Any]:
        """As JSON-serialisable values; clocks differ between processes, so times are relative."""
        remaining = None if self._open_until is None else max(self._open_until - now, 0.0)
        return {"in_a_row": self._in_a_row, "open_for_s": remaining}

    def load_state_dict(self, state: Mapping[str, Any], now: float) -> None:
        """Restores ``state_dict``'s values."""
        self._in_a_row = int(state["in_a_row"])
        remaining = state["open_for_s"]
        self._open_until = None if remaining is None else now + float(remaining)
        self._is_probing = False
