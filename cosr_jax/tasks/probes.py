"""Fixed held-out problems on which progress is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from cosr_jax.protocols import TaskSource
from cosr_jax.types import Task, UserError

#: Draws without a new question, per question already found, after which a cell counts as
#: exhausted.  A question that is half as likely as the others is overlooked with chance ~e^-20.
_PATIENCE = 40


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """Problems of one measurement, in a fixed order."""

    name: str
    tasks: tuple[Task, ...]
    sha256: str  # hex, over the canonical JSON of the tasks; of reports and comparisons
    shortfalls: tuple[tuple[str, int, int], ...] = ()  # (cell, asked, found) where found < asked


def tasks_sha256(tasks: Sequence[Task]) -> str:
    """SHA-256, in hex, of the tasks as canonical JSON (sorted keys, no blanks, UTF-8)."""
    records = [dataclasses.asdict(task) for task in tasks]
    text = json.dumps(records, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def expand_cells(source: TaskSource, cells: Sequence[tuple[str, int]]) -> dict[str, int]:
    """{cell: count} after expansion of ``*`` and ``skill/*`` over the source's cells.

    Of a cell that is named more than once the largest count holds, so that
    ``*:20,addition/2:200`` means what it says.

    Raises:
      UserError: a name matches no cell of the source.
    """
    known = source.cells()
    counts: dict[str, int] = {}
    for name, count in cells:
        if name == "*":
            matches = known
        elif name.endswith("/*"):
            matches = tuple(cell for cell in known if cell.startswith(name[:-1]))
        else:
            matches = tuple(cell for cell in known if cell == name)
        if not matches:
            skills = ", ".join(dict.fromkeys(cell.rpartition("/")[0] for cell in known))
            raise UserError(
                f"probes: {name!r} is no cell of the task source", f"its skills are {skills}"
            )
        for cell in matches:
            counts[cell] = max(count, counts.get(cell, 0))
    return counts


def build_probes(
    source: TaskSource, name: str, cells: Sequence[tuple[str, int]], split: str
) -> ProbeSet:
    """The same problems for every run: they depend on the arguments alone, never on a run's seed.

    Args:
      source: where the problems come from.
      name: the suite's name in reports.
      cells: (cell, count) pairs as ``config.parse_cells`` reads them.
      split: "validation" or "test".

    Returns:
      Problems with distinct keys, cell by cell.  A cell that holds fewer distinct problems than
      asked gives all it has and is listed in ``shortfalls``.

    Raises:
      UserError: a cell is unknown, or holds no problem in ``split``.
    """
    tasks: dict[str, Task] = {}
    shortfalls = []
    for cell, count in expand_cells(source, cells).items():
        found = seed = last_new = 0
        while found < count and seed - last_new <= _PATIENCE * (found + 1):
            task = source.draw(cell, seed, split)
            seed += 1
            if task.key not in tasks:
                tasks[task.key] = task
                found, last_new = found + 1, seed
        if found < count:
            shortfalls.append((cell, count, found))
    chosen = tuple(tasks.values())
    return ProbeSet(name, chosen, tasks_sha256(chosen), tuple(shortfalls))
