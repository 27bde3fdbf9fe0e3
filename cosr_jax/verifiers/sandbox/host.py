"""The parent's side of a sandbox: starts a fork server, sends it cases, hears how they ended."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cosr_jax
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import wire

#: How long a server may take to import its libraries, and to end a killed case; seconds of wall.
_START_S = 60.0
_KILL_S = 20.0

#: Exit code of a member whose entry raised MemoryError; ``member`` has the same.
_OUT_OF_MEMORY = 86

#: What tasks use and what costs time to import after the fork.
STANDARD_PRELOAD = (
    "bisect",
    "collections.abc",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "time",
    "typing",
)


class SandboxError(Exception):
    """The sandbox's own trouble: its server died, could not fork, or does not answer."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a case.

    ``entry`` is "package.module:function", called as ``function(fds, argument)`` in a fresh fork of
    the server.  ``fds`` are passed to the server; the host keeps and closes its own copies.
    """

    entry: str
    fds: tuple[int, ...]
    argument: bytes
    limits: Limits


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a member ended: with ``code``, or by ``signal``; the other one is None."""

    code: int | None
    signal: int | None
    cpu_s: float
    out_of_memory: bool
    detail: str


class Case:
    """Members under way; made by ``Sandbox.spawn``."""

    def __init__(self, sandbox: Sandbox, number: int, size: int):
        self._sandbox = sandbox
        self._number = number
        loop = asyncio.get_running_loop()
        self._exits: list[asyncio.Future[Exit]] = [loop.create_future() for _ in range(size)]
        self._gone: asyncio.Future[None] = loop.create_future()
        for future in (*self._exits, self._gone):
            future.add_done_callback(_retrieve)

    async def wait(self, index: int) -> Exit:
        """How the member of that index ended, once it has; any number of callers may wait.

        Raises:
          SandboxError: the server died, or could not start the member.
        """
        return await asyncio.shield(self._exits[index])

    async def kill(self) -> None:
        """Ends every process of the case and returns when none is left.

        Raises:
          SandboxError: the server does not answer; it has been killed, and the case with it.
        """
        if self._gone.done():
            return
        self._sandbox._send(wire.encode(wire.KILL, self._number))
        try:
            await asyncio.wait_for(asyncio.shield(self._gone), _KILL_S)
        except TimeoutError:
            self._sandbox._fail(f"the server did not end a case within {_KILL_S:.0f} s")
            raise SandboxError(f"the server did not end a case within {_KILL_S:.0f} s") from None

    def _hear(self, frame: wire.Frame) -> None:
        if frame.kind == wire.EXITED:
            index, status, cpu_s, _, _ = wire.EXIT.unpack(frame.body)
            if not self._exits[index].done():
                self._exits[index].set_result(_exit(status, cpu_s))
        elif frame.kind == wire.FAILED:
            self._fail(SandboxError(frame.body.decode()))
        elif frame.kind == wire.GONE and not self._gone.done():
            self._gone.set_result(None)

    def _fail(self, error: SandboxError) -> None:
        for future in self._exits:
            if not future.done():
                future.set_exception(error)

    def _lost(self, error: SandboxError) -> None:
        self._fail(error)
        if not self._gone.done():
            self._gone.set_result(None)  # the server's death takes every member with it


class Sandbox:
    """One warm fork server behind one isolation layer.

    Args:
      layer: "auto" or the name of a layer.
      preload: modules to import before the first fork, beside ``STANDARD_PRELOAD``.
    """

    def __init__(self, layer: str, preload: Sequence[str] = ()):
        self.layer = layer
        self._preload = (*STANDARD_PRELOAD, *preload)
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._cases: dict[int, Case] = {}
        self._count = 0
        self._unsent = bytearray()
        self._ready: asyncio.Future[None] | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the server runs, as far as is known."""
        return self._sock is not None

    async def start(self) -> None:
        """Starts the server, again after its death, and returns when it is warm.

        Raises:
          SandboxError: it could not be started.
        """
        self._loop = asyncio.get_running_loop()
        self._sock, theirs = socket.socketpair()
        self._sock.setblocking(False)
        self._ready = self._loop.create_future()
        self._ready.add_done_callback(_retrieve)
        with theirs:
            boot = {"path": _import_path(), "fd": theirs.fileno(), "preload": self._preload}
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", _BOOT, json.dumps(boot)],
                env={"PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
            )
        self._reader = wire.Reader(self._sock)
        self._loop.add_reader(self._sock, self._read)
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), _START_S)
        except TimeoutError:
            self._fail("the server did not start")
            raise SandboxError(f"the sandbox's server did not start in {_START_S:.0f} s") from None

    async def close(self) -> None:
        """Ends the server and everything in it."""
        self._fail("the sandbox was closed")

    async def spawn(self, members: Sequence[Member]) -> Case:
        """Starts the members of a case, isolated from each other.

        Raises:
          SandboxError: the server is dead.
        """
        orders = [
            wire.Order(
                m.entry,
                len(m.fds),
                m.limits.memory_mb,
                m.limits.file_mb,
                _cpu_seconds(m.limits),
                m.argument,
            )
            for m in members
        ]
        fds = [fd for m in members for fd in m.fds]
        self._count += 1
        case = Case(self, self._count, len(members))
        self._cases[self._count] = case
        self._send(wire.encode(wire.SPAWN, self._count, wire.encode_orders(orders), len(fds)), fds)
        return case

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if self._sock is None:
            raise SandboxError("the sandbox's server is dead")
        if fds:
            # Descriptors go with the first byte, so they must not overtake what waits.
            sent = socket.send_fds(self._sock, [data], fds)
        else:
            sent = self._sock.send(data)
        if sent < len(data):
            raise NotImplementedError

    def _read(self) -> None:
        try:
            for frame in self._reader.frames():
                if frame.kind == wire.READY:
                    if not self._ready.done():
                        self._ready.set_result(None)
                elif frame.case in self._cases:
                    case = self._cases[frame.case]
                    if frame.kind == wire.GONE:
                        del self._cases[frame.case]
                    case._hear(frame)
        except EOFError:
            self._fail("the sandbox's server died")

    def _fail(self, reason: str) -> None:
        if self._sock is None:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._sock = None
        self._process.kill()
        self._process.wait()
        error = SandboxError(reason)
        if not self._ready.done():
            self._ready.set_exception(error)
        cases, self._cases = self._cases, {}
        for case in cases.values():
            case._lost(error)


_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path'];"
    "from cosr_jax.verifiers.sandbox.server import main; main()"
)


def _import_path() -> list[str]:
    root = str(Path(cosr_jax.__file__).parent.parent)
    path = [str(Path(p).resolve()) for p in sys.path if p and Path(p).exists()]
    return [*path, *([] if root in path else [root])]


def _cpu_seconds(limits: Limits) -> int:
    """A backstop behind the wall clock: every core may be busy all the time."""
    return int(limits.wall_s * (os.cpu_count() or 1)) + 2


def _exit(status: int, cpu_s: float) -> Exit:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return Exit(None, number, cpu_s, False, f"killed by {name}")
    code = os.waitstatus_to_exitcode(status)
    return Exit(code, None, cpu_s, code == _OUT_OF_MEMORY, f"exit code {code}")


def _retrieve(future: asyncio.Future) -> None:
    if not future.cancelled():
        future.exception()  # nobody may be waiting, and that is no mistake
