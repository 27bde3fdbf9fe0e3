"""Entries that the layers' probe and the package's tests run inside a sandbox."""

from __future__ import annotations

import os


def echo(fds: list[int], argument: bytes) -> None:
    """Writes its argument to its first descriptor."""
    os.write(fds[0], argument)
