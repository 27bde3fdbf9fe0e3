"""Past problems, kept against forgetting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from cosr_jax.types import Task


class ReplayBuffer:
    """The latest ``capacity`` distinct tasks that were trained on; the oldest leave first.

    Args:
      capacity: most tasks kept, over all cells together; at least 1.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity {capacity} is under 1")
        self.capacity = capacity
        self._tasks: dict[str, Task] = {}  # by task_id, oldest first

    def __len__(self) -> int:
        return len(self._tasks)

    def cells(self) -> tuple[str, ...]:
        """The cells of the tasks held, in the order in which they first appear."""
        return tuple(dict.fromkeys(task.cell for task in self._tasks.values()))

    def tasks(self) -> tuple[Task, ...]:
        """All tasks held, oldest first."""
        return tuple(self._tasks.values())

    def add(self, tasks: Iterable[Task]) -> None:
        """Takes in tasks; one that is held already counts as trained anew."""
        for task in tasks:
            self._tasks.pop(task.task_id, None)
            self._tasks[task.task_id] = task
            if len(self._tasks) > self.capacity:
                del self._tasks[next(iter(self._tasks))]

    def draw(
        self, count: int, rng: np.random.Generator, cells: Collection[str] | None = None
    ) -> list[Task]:
        """Draws distinct tasks: first a cell, then one of its tasks, each uniformly.

        A cell that was trained much therefore does not crowd out the others.

        Args:
          count: how many; fewer come when the buffer holds fewer.
          rng: the only source of randomness.
          cells: cells to draw from; None: all.
        """
        pools: dict[str, list[Task]] = {}
        for task in self._tasks.values():
            if cells is None or task.cell in cells:
                pools.setdefault(task.cell, []).append(task)
        drawn: list[Task] = []
        while pools and len(drawn) < count:
            cell = list(pools)[rng.integers(len(pools))]
            pool = pools[cell]
            drawn.append(pool.pop(rng.integers(len(pool))))
            if not pool:
                del pools[cell]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The tasks, oldest first, as JSON-serialisable values."""
        return {"tasks": [task.to_dict() for task in self._tasks.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the content by ``state_dict``'s; over capacity the oldest leave."""
        self._tasks = {}
        self.add(Task.from_dict(record) for record in state["tasks"])
