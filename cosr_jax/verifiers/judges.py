"""What the pool asks of a domain's judge."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from cosr_jax.types import Completion, Task, Verdict


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one case may use; a domain ignores the limits that mean nothing to it."""

    wall_s: float = 5.0  # wall clock: of all tests together, or of each input of a script
    memory_mb: int = 512  # MiB, all processes of the case together
    output_kb: int = 64  # KiB printed
    file_mb: int = 16  # MiB written to files


class Judge(Protocol):
    """Judges the completions of one domain.

    Nothing that a completion does makes ``judge`` raise: the student's doing is a PASS or FAIL, and
    the judge's own trouble an ERROR, which the pool tries once more.  The same input always gives
    the same outcome, reward and category.
    """

    async def start(self) -> None:
        """Makes ready, before the first ``judge``.

        Raises:
          UserError: this machine or installation lacks what the domain needs.
        """

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict; many calls may be under way at once.

        When cancelled, the case's processes are gone before the cancellation goes on.
        """
        ...

    async def close(self) -> None:
        """Ends every process; ``judge`` is not called any more."""
