"""What ``cosr doctor`` is made of: named questions, answered one a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from cosr_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Check:
    """A named question; ``ask`` answers in words or raises ``UserError``."""

    name: str
    ask: Callable[[], str]
    is_needed: bool = False  # nothing that comes after it can be asked without


def ask_all(checks: Iterable[Check]) -> int:
    """Prints what was found and returns the exit code: 0, or 1 where something has to be mended."""
    failed = 0
    for check in checks:
        try:
            mark, found = "ok  ", check.ask()
        except UserError as error:
            mark, found = "FAIL", str(error)
            failed += 1
        print(f"{mark} {check.name:9} {found}", flush=True)
        if mark == "FAIL" and check.is_needed:
            break
    return 1 if failed else 0
