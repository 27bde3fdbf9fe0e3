"""Which row is decoded in which slot, and when."""

from __future__ import annotations

import dataclasses
from collections import deque

from cosr_jax.buckets import bucket_rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call's arrays."""

    slots: int  # rows decoded at once
    places: int  # of prompts; slots / places slots read each

    @classmethod
    def of(cls, prompts: int, samples: int, max_rows: int, shards: int) -> Layout:
        """The layout of a call.

        Where all rows fit at once, a place serves all samples of its prompt.  Otherwise a slot can
        go to any prompt's sample, and so every slot has a place of its own: prompts are then kept
        once a slot, but computed once all the same.

        Args:
          prompts: at least 1.
          samples: of each prompt.
          max_rows: most slots.
          shards: pieces that a mesh cuts rows into; slots are a multiple.
        """
        if prompts * samples <= max_rows:
            places = bucket_rows(prompts, max(1, max_rows // samples), shards)
            return cls(places * samples, places)
        slots = max_rows + -max_rows % shards
        return cls(slots, slots)


class Schedule:
    """Rows wait in order; a slot that is free gets the next.

    Row r is sample r % samples of prompt r // samples.
    """

    def __init__(self, prompts: int, samples: int, slots: int, refill: bool):
        """``refill``: whether a slot is filled as soon as it is free, or when all are."""
        self._samples = samples
        self._waiting = deque(range(prompts * samples))
        self._rows: list[int | None] = [None] * slots
        self._refill = refill

    @property
    def is_waiting(self) -> bool:
        """Whether rows wait for slots."""
        return bool(self._waiting)

    @property
    def is_done(self) -> bool:
        """Whether no row waits or runs."""
        return not self._waiting and all(row is None for row in self._rows)

    def enter(self) -> list[tuple[int, int]]:
        """The (slot, row) pairs that begin now."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        if not self._refill and len(free) < len(self._rows):
            return []
        pairs = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        for slot, row in pairs:
            self._rows[slot] = row
        return pairs

    def running(self) -> list[tuple[int, int]]:
        """(slot, row) of the rows in slots."""
        return [(slot, row) for slot, row in enumerate(self._rows) if row is not None]

    def leave(self, slot: int) -> None:
        """Its row has ended."""
        self._rows[slot] = None

    def withdraw(self, prompt: int) -> list[int]:
        """The prompt's rows that wait no longer, since nobody wants them."""
        withdrawn = [row for row in self._waiting if row // self._samples == prompt]
        self._waiting = deque(row for row in self._waiting if row // self._samples != prompt)
        return withdrawn
