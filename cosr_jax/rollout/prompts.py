"""The prompts of one call: padded, prefilled some at a time, and brought to their slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from cosr_jax.buckets import bucket_length, bucket_rows
from cosr_jax.rollout.schedule import Layout
from cosr_jax.rollout.slots import Admission, Prompts, Turn

#: Tokens that a device prefills at once: enough for products at full speed, and activations small.
_PREFILL_TOKENS = 8192


class PromptStore:
    """Computes each prompt once, when the first of its rows enters, and keeps it until the last.

    Args:
      prompts: token ids of each; none is empty.
      samples: rows of each prompt.
      layout: of the call.
      limit: longest prompt allowed, in tokens.
      shards: pieces that a mesh cuts prompts into.
      pad_id: fills short prompts up.
      prefill: (int32 tokens, int32 positions, -1 on padding; both [prompts, width]) -> ``Prompts``.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        layout: Layout,
        limit: int,
        shards: int,
        pad_id: int,
        prefill: Callable[[np.ndarray, np.ndarray], Prompts],
    ):
        self._prompts, self._samples, self._layout = prompts, samples, layout
        self._pad_id, self._prefill = pad_id, prefill
        # The last token is not prefilled: decoding begins with it.
        longest = max(len(prompt) for prompt in prompts) - 1
        self.width = bucket_length(max(1, longest), limit - 1)
        most = max(1, shards * _PREFILL_TOKENS // self.width)
        self._per_batch = bucket_rows(min(len(prompts), most), most, shards)
        self._batches: dict[int, Prompts] = {}
        self._positions = np.full((layout.places, self.width), -1, np.int32)

    def admissions(self, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[Prompts, Admission]]:
        """What brings the prompts of rows to their places.

        Args:
          pairs: (slot, row) that enter; rows ascend, within the call and from call to call.
        """
        for number, group in groupby(pairs, lambda pair: self._batch_of(pair[1])):
            yield self._batch(number), self._admission(list(group))

    def turn(self, pairs: Sequence[tuple[int, int]], wanted: np.ndarray, enough: int) -> Turn:
        """What lets rows begin.

        Args:
          pairs: as ``admissions`` was told.
          wanted: bool [slots].
          enough: see ``Turn``.
        """
        fresh = np.zeros(self._layout.slots, bool)
        token, position, number = (np.zeros(len(fresh), np.int32) for _ in range(3))
        for slot, row in pairs:
            prompt = self._prompts[row // self._samples]
            fresh[slot], number[slot] = True, row
            token[slot], position[slot] = prompt[-1], len(prompt) - 1
            self._positions[self._place(slot)] = self._columns(prompt)
        # A copy: the device may read this turn's while the next is written.
        positions = self._positions.copy()
        return Turn(fresh, token, position, number, positions, wanted, np.int32(enough))

    def _place(self, slot: int) -> int:
        return slot // (self._layout.slots // self._layout.places)

    def _batch_of(self, row: int) -> int:
        return row // self._samples // self._per_batch

    def _batch(self, number: int) -> Prompts:
        if number not in self._batches:
            self._batches = {number: self._run(number)}
        return self._batches[number]

    def _run(self, number: int) -> Prompts:
        first = number * self._per_batch
        tokens = np.full((self._per_batch, self.width), self._pad_id, np.int32)
        positions = np.full_like(tokens, -1)
        for entry, prompt in enumerate(self._prompts[first : first + self._per_batch]):
            positions[entry] = self._columns(prompt)
            tokens[entry, positions[entry] >= 0] = prompt[:-1]
        return self._prefill(tokens, positions)

    def _columns(self, prompt: Sequence[int]) -> np.ndarray:
        """Positions of all tokens but the last, padded on the left with -1: int32 [width]."""
        first = self.width - (len(prompt) - 1)
        return np.maximum(np.arange(self.width, dtype=np.int32) - first, -1)

    def _admission(self, pairs: Sequence[tuple[int, int]]) -> Admission:
        entry_of_place = {
            self._place(slot): row // self._samples % self._per_batch for slot, row in pairs
        }
        filled, places = len(entry_of_place), self._layout.places
        at_places, entries = np.zeros(places, np.int32), np.zeros(places, np.int32)
        at_places[:filled], entries[:filled] = list(entry_of_place), list(entry_of_place.values())
        return Admission(at_places, entries, np.int32(filled))
