"""What decides a task's split, and randomness that reads the same on every Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

SPLITS = ("train", "validation", "test")

#: Upper bounds, out of 100, of the splits' shares in the order of ``SPLITS``.
_BOUNDS = (50, 70, 100)

T = TypeVar("T")


def split_of(key: str) -> str:
    """The only split in which the question ``key`` may appear.

    The split is a function of the question's canonical content alone, through SHA-256, so
    that no generator, seed or wording can carry a question from one split into another, and so that
    it is independent of every feature of the content.  Shares: 50, 20 and 30 %.
    """
    bucket = int.from_bytes(hashlib.sha256(f"split\n{key}".encode()).digest()[:8]) % 100
    return next(split for split, bound in zip(SPLITS, _BOUNDS, strict=True) if bucket < bound)


class Dice:
    """A random stream named by strings.

    Only ``random.Random.random`` is promised to stay the same between Python versions, so
    everything here is made of it: probe hashes do not change with the interpreter.
    """

    def __init__(self, *names: object):
        digest = hashlib.sha256("\n".join(map(str, names)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest)).random

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in random order (Fisher-Yates)."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.between(0, last)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed
