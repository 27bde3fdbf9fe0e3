"""One fork server as its parent sees it: starts it, sends it cases, hears how they ended."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import layers, wire

#: Seconds of wall clock: to import the libraries, to end a killed case, to end the server itself.
_START_S = 60.0
_KILL_S = 10.0
_CLOSE_S = 2.0

_ENDLESS = 1 << 24  # seconds, MiB
_CORES = os.cpu_count() or 1

#: The same string hashes in every server, so the same verdicts; symbols of libraries are looked up
#: by the server, not again in every fork.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path'];"
    "from cosr_jax.verifiers.sandbox.server import main; main()"
)
_LIMITS = {
    wire.NO_LIMIT: "",
    wire.CPU_LIMIT: "cpu",
    wire.MEMORY_LIMIT: "memory",
    wire.FILE_LIMIT: "files",
}


class SandboxError(Exception):
    """The sandbox's own trouble: its server died, could not fork, or does not answer."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a case.

    ``entry`` is "package.module:function", called as ``function(fds, argument)`` in a fresh fork of
    the server, with descriptors 0, 1 and 2 on /dev/null and a cwd of its own.  The server never
    sees the argument.  ``fds`` are duplicated for the member; the host keeps and closes its own.
    Of ``limits``, ``memory_mb`` and ``file_mb`` bind this member alone, and ``wall_s`` gives a
    limit of processor time that lies behind the wall clock, which the caller keeps.
    """

    entry: str
    fds: tuple[int, ...]
    argument: bytes
    limits: Limits


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a member ended: with ``code``, or by ``signal``; the other one is None.

    ``limit`` is the one that ended it, as far as the kernel tells: "cpu", "memory", "files" or "".
    """

    code: int | None
    signal: int | None
    cpu_s: float  # user and system
    limit: str
    detail: str  # for people

    @property
    def out_of_memory(self) -> bool:
        """Whether it ended for want of memory."""
        return self.limit == "memory"


class Case:
    """Members under way."""

    def __init__(self, server: ServerProcess, number: int, size: int):
        self._server = server
        self._number = number
        loop = asyncio.get_running_loop()
        self._exits: list[asyncio.Future[Exit]] = [loop.create_future() for _ in range(size)]
        self._gone: asyncio.Future[None] = loop.create_future()
        for future in self._exits:
            future.add_done_callback(_retrieve)
        self._gone.add_done_callback(_retrieve)

    async def wait(self, index: int) -> Exit:
        """How the member of that index ended, once it has; any number of callers may wait.

        Raises:
          SandboxError: the server died, or could not start the member.
        """
        return await asyncio.shield(self._exits[index])

    async def kill(self) -> None:
        """Ends every process of the case and returns when none is left.

        Without effect on a case that is over.

        Raises:
          SandboxError: the server died meanwhile, or does not answer and has been killed; nothing
            of the case is left, but what is known of it may not be its own doing.
        """
        if self._gone.done():
            return
        self._server.send(wire.encode(wire.KILL, self._number))
        try:
            await asyncio.wait_for(asyncio.shield(self._gone), _KILL_S)
        except TimeoutError:
            reason = f"the sandbox's server did not end a case within {_KILL_S:.0f} s"
            self._server.fail(reason)
            raise SandboxError(reason) from None

    def hear(self, frame: wire.Frame) -> None:
        """Takes what the server says of this case."""
        if frame.kind == wire.EXITED:
            index, status, cpu_s, limit = wire.EXIT.unpack(frame.body)
            if not self._exits[index].done():
                self._exits[index].set_result(_exit(status, cpu_s, _LIMITS[limit]))
        elif frame.kind == wire.FAILED:
            self.fail(SandboxError(frame.body.decode(errors="replace")))
        elif frame.kind == wire.GONE and not self._gone.done():
            self._gone.set_result(None)

    def fail(self, error: SandboxError) -> None:
        """Tells all who wait that they wait for nothing."""
        for future in self._exits:
            if not future.done():
                future.set_exception(error)

    def lose(self, error: SandboxError) -> None:
        """As ``fail``, and so does a ``kill`` that waits; the server took every member with it."""
        self.fail(error)
        if not self._gone.done():
            self._gone.set_exception(error)


class ServerProcess:
    """One fork server, from its start to its end.

    Args:
      layer: the name of a layer.
      preload: modules to import before the first fork.
      optional: the same, for what may not be installed.
    """

    def __init__(self, layer: str, preload: Sequence[str], optional: Sequence[str] = ()):
        self._layer = layer
        self._preload = tuple(preload)
        self._optional = tuple(optional)
        self._cases: dict[int, Case] = {}
        self._num_cases = 0
        self._unsent: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()
        self._sock: socket.socket | None = None
        self._pidfds: list[int] = []  # of the server and what is around it
        self._outer = -1  # of the process that was started here
        self._base: str | None = None
        self._process: subprocess.Popen[bytes]
        self._reason = ""

    @property
    def is_alive(self) -> bool:
        """Whether the server runs, as far as is known."""
        return self._sock is not None

    @property
    def reason(self) -> str:
        """Why the server is dead."""
        return self._reason

    async def start(self) -> None:
        """Returns when the server is warm.

        Raises:
          SandboxError: it could not be started; its last words are in the message.
        """
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ready.add_done_callback(_retrieve)
        try:
            self._launch()
        except OSError as error:
            self._remove_base()
            raise SandboxError(f"{error}") from error
        assert self._sock is not None
        self._reader = wire.Reader(self._sock)
        loop.add_reader(self._sock, self._read)
        self._outer = os.pidfd_open(self._process.pid)
        loop.add_reader(self._outer, self._read_last)
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), _START_S)
        except TimeoutError:
            self.fail(f"the sandbox's server did not start within {_START_S:.0f} s")
            raise SandboxError(self._reason) from None
        except asyncio.CancelledError:
            self.fail("its start was cancelled")
            raise

    def _launch(self) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.setblocking(False)
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        visible = layers.visible_paths()
        if self._layer == "landlock":
            parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            self._base = tempfile.mkdtemp(prefix="cosr-sandbox-", dir=parent)
        boot = {
            "layer": self._layer,
            "sock": theirs.fileno(),
            "proc": proc,
            "path": layers.import_path(),
            "visible": visible,
            "base": self._base,
            "preload": self._preload,
            "optional": self._optional,
        }
        python = [str(Path(sys.executable).resolve()), "-S", "-s", "-P", "-B", "-X", "utf8"]
        try:
            self._process = subprocess.Popen(
                layers.command(self._layer, [*python, "-c", _BOOT, json.dumps(boot)], visible),
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno(), proc],
                cwd="/",
                start_new_session=True,  # an interrupt from the terminal is for the host
            )
        except OSError:
            self._sock.close()
            self._sock = None
            raise
        finally:
            theirs.close()
            os.close(proc)

    def spawn(self, members: Sequence[Member]) -> Case:
        """Starts the members of a case.

        Raises:
          SandboxError: the server is dead.
          ValueError: the members have more descriptors together than one message carries.
        """
        orders = [_order(m) for m in members]
        self._num_cases += 1
        number = self._num_cases
        arguments = []
        try:
            fds: list[int] = []
            for m in members:
                if m.argument:
                    arguments.append(_in_memory(m.argument))
                    fds.append(arguments[-1])
                fds += m.fds
            if len(fds) > wire.MAX_FDS:
                raise ValueError(f"{len(fds)} descriptors in one case, at most {wire.MAX_FDS}")
            case = Case(self, number, len(members))
            self._cases[number] = case
            body = wire.encode_orders(orders)
            self.send(wire.encode(wire.SPAWN, number, body, len(fds)), fds)
        except OSError as error:
            raise SandboxError(f"cannot hand a case over: {error}") from error
        finally:
            for fd in arguments:
                os.close(fd)
        return case

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends a frame, now or as soon as the server reads again.

        Raises:
          SandboxError: the server is dead.
        """
        if self._sock is None:
            raise SandboxError(self._reason or "the sandbox is not started")
        # A frame that has to wait keeps duplicates, for the caller may close its descriptors.
        if not self._unsent:
            data, fds = self._write(data, fds)
        if data:
            if not self._unsent:
                self._loop.add_writer(self._sock, self._flush)
            self._unsent.append((data, tuple(os.dup(fd) for fd in fds)))

    def _write(self, data: bytes, fds: Sequence[int]) -> tuple[bytes, Sequence[int]]:
        """Returns what is left to send."""
        assert self._sock is not None
        try:
            sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
        except BlockingIOError:
            return data, fds
        except ConnectionError:
            self.fail("the sandbox's server died")
            raise SandboxError(self._reason) from None
        return data[sent:], ()

    def _flush(self) -> None:
        with contextlib.suppress(SandboxError):  # those who wait have heard of it
            while self._unsent:
                data, fds = self._unsent.popleft()
                left, left_fds = self._write(data, fds)
                if not left_fds:
                    for fd in fds:
                        os.close(fd)
                if left:
                    self._unsent.appendleft((left, tuple(left_fds)))
                    return
            if self._sock is not None:
                self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        try:
            for frame in self._reader.frames():
                if frame.kind == wire.READY:
                    self._pidfds = [os.pidfd_open(pid) for pid in json.loads(frame.body)]
                    self._ready.set_result(None)
                elif frame.case in self._cases:
                    case = self._cases[frame.case]
                    if frame.kind == wire.GONE:
                        del self._cases[frame.case]
                    case.hear(frame)
        except (EOFError, ProcessLookupError):
            self.fail("the sandbox's server died")

    def _read_last(self) -> None:
        """Hears what the server said before its end, of which its socket need not tell."""
        self._read()
        self.fail("the sandbox's server died")

    def fail(self, reason: str) -> None:
        """Kills the server at once; all that wait for it hear ``reason``."""
        if self._sock is None:
            return
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._process.kill()
        self._finish(reason)

    async def close(self) -> None:
        """Ends the server and everything in it, and returns when nothing is left."""
        if self._sock is None:
            return
        self._loop.remove_reader(self._sock)
        self._sock.shutdown(socket.SHUT_WR)
        ended = asyncio.Event()
        self._loop.add_reader(self._outer, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), _CLOSE_S)
        except TimeoutError:
            pass  # it hangs, and is killed
        finally:
            self.fail("the sandbox was closed")

    def _finish(self, reason: str) -> None:
        assert self._sock is not None and self._process.stderr is not None
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._sock = None
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        self._loop.remove_reader(self._outer)
        for pidfd in self._pidfds:
            _await_end(pidfd)
        for pidfd in (*self._pidfds, self._outer):
            os.close(pidfd)
        self._process.wait()
        os.set_blocking(self._process.stderr.fileno(), False)
        words = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        self._process.stderr.close()
        self._remove_base()
        self._reason = f"{reason}: {words}" if words else reason
        error = SandboxError(self._reason)
        if not self._ready.done():
            self._ready.set_exception(error)
        cases, self._cases = self._cases, {}
        for case in cases.values():
            case.lose(error)

    def _remove_base(self) -> None:
        if self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)
            self._base = None


def _await_end(pidfd: int) -> None:
    """Blocks for the few milliseconds that a killed process and its namespace take to end."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(1000 * _CLOSE_S)


def _in_memory(data: bytes) -> int:
    """A descriptor of a file in memory that holds ``data``."""
    fd = os.memfd_create("argument", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _order(member: Member) -> wire.Order:
    """The kernel's view of a member; limits beyond ``_ENDLESS`` are none."""
    limits = member.limits
    # A backstop behind the wall clock: every core may be busy all the time.
    cpu_s = min(limits.wall_s * _CORES, _ENDLESS) + 2
    return wire.Order(
        member.entry,
        bool(member.argument) + len(member.fds),
        len(member.argument),
        int(min(limits.memory_mb, _ENDLESS)),
        int(min(limits.file_mb, _ENDLESS)),
        int(cpu_s),
    )


def _exit(status: int, cpu_s: float, limit: str) -> Exit:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        detail = f"killed by {name}" + (f" for its {limit} limit" if limit else "")
        return Exit(None, number, cpu_s, limit, detail)
    code = os.waitstatus_to_exitcode(status)
    return Exit(code, None, cpu_s, limit, f"exit code {code}")


def _retrieve(future: asyncio.Future) -> None:
    if not future.cancelled():
        future.exception()  # perhaps nobody waits, and that is no mistake
