"""A circuit breaker: a server that keeps failing is left alone, then tested by one request.

Closed until ``failures`` requests in a row fail; open, refusing all, for ``cooldown_s`` seconds;
then half open: one request, the probe, is let through, and its success closes the breaker while
its failure opens it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


class Permit:
    """Leave to send one request; give it back with ``Breaker.settle``, whatever happens."""


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
        self._probe: Permit | None = None

    @property
    def is_probing(self) -> bool:
        """Whether the one request that decides is under way."""
        return self._probe is not None

    def state(self, now: float) -> Literal["closed", "open", "half_open"]:
        """What the next request meets."""
        if self._open_until is None:
            return "closed"
        return "half_open" if now >= self._open_until and not self.is_probing else "open"

    def admit(self, now: float) -> Permit | None:
        """Leave for one request, or None."""
        state = self.state(now)
        if state == "open":
            return None
        permit = Permit()
        if state == "half_open":
            self._probe = permit
        return permit

    def settle(self, permit: Permit, is_healthy: bool | None, now: float) -> bool:
        """Takes the outcome of an admitted request; returns whether the breaker opened by it.

        ``is_healthy`` None means that nothing was learnt, because we gave the request up ourselves.
        """
        is_probe = permit is self._probe
        if is_probe or is_healthy:
            self._probe = None
        if is_healthy:
            self._in_a_row, self._open_until = 0, None
        if is_healthy is not False or (self._open_until is not None and not is_probe):
            return False  # the latter was sent before the breaker opened: old news
        self._in_a_row += 1
        if not is_probe and self._in_a_row < self._limit:
            return False
        self._open_until = now + self._cooldown_s
        return True

    def state_dict(self, now: float) -> dict[str, Any]:
        """As JSON-serialisable values; clocks differ between processes, so times are relative."""
        remaining = None if self._open_until is None else max(self._open_until - now, 0.0)
        return {"in_a_row": self._in_a_row, "open_for_s": remaining}

    def load_state_dict(self, state: Mapping[str, Any], now: float) -> None:
        """Restores ``state_dict``'s values."""
        self._in_a_row = int(state["in_a_row"])
        remaining = state["open_for_s"]
        self._open_until = None if remaining is None else now + float(remaining)
        self._probe = None
