"""The warm fork server: imports once, forks for every member of every case, reaps and reports.

One thread and one loop.  It runs inside the isolation layer, holds no data of any case after the
fork, and ends when the host's end of its socket closes.
"""

from __future__ import annotations

import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from cosr_jax.verifiers.sandbox import member, wire

#: One byte for each member under way: 1 once it stands in its isolation and runs its entry.  The
#: member unmaps it before it runs anything of the case, so that nobody can forge the mark.
_MARKS = 4096


class Server:
    """Forks members on the host's orders.

    Args:
      sock: the stream socket to the host.
      isolation: what each member does to itself after the fork.
    """

    def __init__(self, sock: socket.socket, isolation: member.Isolation):
        self._sock = sock
        self._isolation = isolation
        self._reader = wire.Reader(sock)
        self._entries: dict[str, Callable[[list[int], bytes], None]] = {}
        self._members: dict[int, tuple[int, int, int]] = {}  # pid: case, index, mark
        self._cases: dict[int, set[int]] = {}  # case: pids under way
        self._marks = mmap.mmap(-1, _MARKS)
        self._free_marks = list(range(_MARKS))

    def run(self) -> None:
        """Serves until the host goes away."""
        wake, wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, else the wakeup is not written
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        self._sock.setblocking(False)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(wake, select.POLLIN)
        self._send(wire.READY, 0)
        while True:
            for fd, _ in poll.poll():
                if fd == wake:
                    os.read(wake, 4096)
                    self._reap()
                    continue
                try:
                    for frame in self._reader.frames():
                        self._serve(frame)
                except EOFError:
                    return

    def _serve(self, frame: wire.Frame) -> None:
        if frame.kind == wire.SPAWN:
            try:
                self._spawn(frame)
            except OSError as error:
                self._kill(frame.case)
                self._send(wire.FAILED, frame.case, f"{type(error).__name__}: {error}".encode())
            finally:
                for fd in frame.fds:
                    os.close(fd)
        elif frame.kind == wire.KILL:
            self._kill(frame.case)
            if frame.case not in self._cases:
                self._send(wire.GONE, frame.case)

    def _spawn(self, frame: wire.Frame) -> None:
        fds = list(frame.fds)
        for index, order in enumerate(wire.decode_orders(frame.body)):
            entry = self._entry(order.entry)
            own, fds = fds[: order.num_fds], fds[order.num_fds :]
            mark = self._free_marks.pop()
            self._marks[mark] = 0
            pid = self._isolation.fork()
            if pid == 0:
                member.run(self._isolation, entry, own, order, self._marks, mark)
            self._members[pid] = (frame.case, index, mark)
            self._cases.setdefault(frame.case, set()).add(pid)

    def _entry(self, name: str) -> Callable[[list[int], bytes], None]:
        if name not in self._entries:
            module, _, function = name.partition(":")
            self._entries[name] = getattr(importlib.import_module(module), function)
            gc.freeze()
        return self._entries[name]

    def _kill(self, case: int) -> None:
        for pid in self._cases.get(case, ()):
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._members:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            case, index, mark = self._members.pop(pid)
            pids = self._cases[case]
            pids.discard(pid)
            if not pids:
                del self._cases[case]
            self._free_marks.append(mark)
            if self._marks[mark]:
                cpu_s = usage.ru_utime + usage.ru_stime
                body = wire.EXIT.pack(index, status, cpu_s, usage.ru_maxrss, not pids)
                self._send(wire.EXITED, case, body)
            else:
                self._send(wire.FAILED, case, b"a member ended before it stood in its isolation")
            if not pids:
                self._send(wire.GONE, case)

    def _send(self, kind: int, case: int, body: bytes = b"") -> None:
        data = wire.encode(kind, case, body)
        # The frames are small and the host reads all the time; if it does not, wait for it.
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                select.select([], [self._sock], [])


def main() -> None:
    """Runs the server described by the JSON in ``sys.argv[1]``; see ``host``."""
    boot = json.loads(sys.argv[1])
    sys.path[:] = boot["path"]
    sock = socket.socket(fileno=boot["fd"])
    try:
        isolation = member.Isolation()
        for name in boot["preload"]:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        gc.disable()
        server = Server(sock, isolation)
        sys.argv[:] = [""]
        os.environ.clear()
        server.run()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
