"""What a fork of the server does between the fork and the first line of its entry."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, Protocol

from cosr_jax.verifiers.sandbox import linux, seccomp, wire

Entry = Callable[[list[int], bytes], None]

MIB = 1 << 20
PAGE = resource.getpagesize()

#: Exit code of a member whose entry raised MemoryError.
OUT_OF_MEMORY = 86
#: Descriptors that a member may have open; enough for honest programs, too few to hurt anybody.
_MAX_FDS = 256
#: Bytes of a mark: 1 once the member stands in its isolation, else the text of what failed.
MARK = 256
#: Address space for libraries that are imported late: mapped files, which are no memory of the
#: case's own.  RLIMIT_DATA holds that to the limit itself.
_LIBRARIES = 128 * MIB


class Isolation(Protocol):
    """What a layer does in the server and in its members; see ``namespaces``, ``confinement``."""

    may_change_attributes: bool
    is_watched: bool
    capabilities: int  # mask of those that members keep
    max_tasks: int | None  # for RLIMIT_NPROC, None where it would count foreign processes

    def prepare(self, place: int, file_mb: int) -> None: ...
    def fork(self) -> int: ...
    def enter(self, place: int) -> None: ...
    def clean(self, place: int) -> None: ...
    def is_over(self, place: int, file_mb: int) -> bool: ...
    def close(self) -> None: ...


class Nursery:
    """What every member of one server has in common.

    Args:
      isolation: the layer.
      marks: shared memory, ``MARK`` bytes for each place.
      statm: descriptor of the server's /proc/self/statm.
    """

    def __init__(self, isolation: Isolation, marks: mmap.mmap, statm: int):
        self._isolation = isolation
        self._marks = marks
        self._statm = statm
        self._server = os.getpid()
        self._most = _most()
        program = seccomp.member_program(isolation.may_change_attributes)
        self._filter = seccomp.Filter(program).of_process(1)

    def memory(self) -> tuple[int, int]:
        """Address space and private writable memory of the server now, in bytes."""
        fields = os.pread(self._statm, 256, 0).split()
        return int(fields[0]) * PAGE, int(fields[5]) * PAGE

    def run(
        self, entry: Entry, fds: list[int], order: wire.Order, place: int, memory: tuple[int, int]
    ) -> NoReturn:
        """In the fork: becomes the member; never returns, never runs the server's clean-up."""
        code = 1
        try:
            try:
                os.dup2(0, 2)
                self._isolation.enter(place)
                _keep_only(fds)
                argument = b""
                if order.argument_size:
                    argument = _read(fds[0], order.argument_size)
                    os.close(fds.pop(0))
                _limit(order, memory, self._isolation.max_tasks, self._most)
                linux.keep_capabilities(self._isolation.capabilities)
                pid = os.getpid()
                if pid != 1:  # not of its own PID namespace, which ends with the server's
                    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
                    if os.getppid() != self._server:
                        os._exit(1)  # it died before the signal was asked for
                self._filter.of_process(pid).put_on()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}".encode()[: MARK - 1]
                self._marks[place * MARK + 1 : place * MARK + 1 + len(text)] = text
                os._exit(1)
            self._marks[place * MARK] = 1
            self._marks.close()
            gc.enable()
            try:
                entry(fds, argument)
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


def _read(fd: int, size: int) -> bytes:
    data = os.pread(fd, size, 0)
    while len(data) < size:
        data += os.pread(fd, size - len(data), len(data))
    return data


def limit_forks() -> None:
    """In the server: the limits that do not depend on the case, which its forks inherit."""
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(kind, (value, value))


def _most() -> dict[int, int]:
    """What the host's own limits leave to give, by kind."""
    kinds = (
        resource.RLIMIT_AS,
        resource.RLIMIT_DATA,
        resource.RLIMIT_CPU,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_NPROC,
    )
    hard = {kind: resource.getrlimit(kind)[1] for kind in kinds}
    return {k: sys.maxsize if v == resource.RLIM_INFINITY else v for k, v in hard.items()}


def _limit(
    order: wire.Order, memory: tuple[int, int], max_tasks: int | None, most: dict[int, int]
) -> None:
    addresses, data = memory
    own = order.memory_mb * MIB
    for kind, value in (
        (resource.RLIMIT_AS, addresses + own + _LIBRARIES),
        (resource.RLIMIT_DATA, data + own),
        (resource.RLIMIT_CPU, order.cpu_s),
        (resource.RLIMIT_FSIZE, order.file_mb * MIB),
        (resource.RLIMIT_NOFILE, _MAX_FDS),
        *(() if max_tasks is None else ((resource.RLIMIT_NPROC, max_tasks),)),
    ):
        value = min(value, most[kind])
        resource.setrlimit(kind, (value, value))
