"""What a fork of the server does between the fork and the first line of its entry."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
from collections.abc import Callable
from typing import NoReturn

from cosr_jax.verifiers.sandbox import wire

MIB = 1 << 20

#: Exit code of a member whose entry raised MemoryError.
OUT_OF_MEMORY = 86


class Isolation:
    """No isolation but the limits: for the package's own tests."""

    def fork(self) -> int:
        """fork(2), in the server."""
        return os.fork()

    def enter(self, order: wire.Order) -> None:
        """In the member."""


def run(
    isolation: Isolation,
    entry: Callable[[list[int], bytes], None],
    fds: list[int],
    order: wire.Order,
    marks: mmap.mmap,
    mark: int,
) -> NoReturn:
    """Becomes the member; never returns, and never runs the server's clean-up."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _keep_only(fds)
        isolation.enter(order)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        marks[mark] = 1
        marks.close()
        gc.enable()
        try:
            entry(fds, order.argument)
            code = 0
        except MemoryError:
            code = OUT_OF_MEMORY
    except BaseException:
        code = 1
    finally:
        os._exit(code)


def _keep_only(fds: list[int]) -> None:
    """Closes every descriptor but 0, 1, 2 and ``fds``."""
    start = 3
    for fd in sorted(fds):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)
