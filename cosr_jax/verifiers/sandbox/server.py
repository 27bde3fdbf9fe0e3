# ruff: noqa: PTH208
"""The warm fork server: imports once, forks for every member of every case, reaps and reports.

One thread and one loop.  It runs inside the isolation layer, holds no data of any case, and ends
when the host's end of its socket closes.
"""

from __future__ import annotations

import dataclasses
import gc
import heapq
import importlib
import importlib.util
import json
import mmap
import os
import select
import signal
import site
import socket
import sys

from cosr_jax.verifiers.sandbox import linux, member, seccomp, wire
from cosr_jax.verifiers.sandbox.confinement import LandlockIsolation
from cosr_jax.verifiers.sandbox.namespaces import NamespaceIsolation, build_root, settle

#: Members under way at most.
_PLACES = 512
#: How often the files of members are counted where no file system does; milliseconds.
_WATCH_MS = 50
#: Threads of numerical libraries: one, because a process with threads cannot fork safely.
_SINGLE_THREADED = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass
class _Running:
    pid: int
    case: int
    index: int
    place: int
    order: wire.Order
    limit: int = wire.NO_LIMIT
    is_killed: bool = False


class Server:
    """Forks members on the host's orders.

    Args:
      sock: the stream socket to the host.
      isolation: the layer.
      statm: descriptor of this process's /proc/self/statm.
    """

    def __init__(self, sock: socket.socket, isolation: member.Isolation, statm: int):
        self._sock = sock
        self._isolation = isolation
        self._reader = wire.Reader(sock)
        # The members' marks: each unmaps them before it runs anything of its case, so that no
        # program can pass for one that never started, or the other way round.
        self._marks = mmap.mmap(-1, _PLACES * member.MARK)
        self._nursery = member.Nursery(isolation, self._marks, statm)
        self._free = list(range(_PLACES))  # a heap: few places are used again and again
        self._entries: dict[str, member.Entry] = {}
        self._poll = select.poll()
        # By pidfd.  A handler of SIGCHLD would do as well, but each member would have to undo it.
        self._running: dict[int, _Running] = {}
        self._cases: dict[int, set[int]] = {}  # pidfds of each case

    def run(self, pids: list[int]) -> None:
        """Serves until the host goes away.

        Args:
          pids: numbers on the machine of this process and those around it, for the host to end.
        """
        self._sock.setblocking(False)
        self._poll.register(self._sock, select.POLLIN)
        self._send(wire.READY, 0, json.dumps(pids).encode())
        while True:
            is_watching = self._isolation.is_watched and self._running
            for fd, _ in self._poll.poll(_WATCH_MS if is_watching else None):
                if fd in self._running:
                    self._reap(fd)
                    continue
                try:
                    for frame in self._reader.frames():
                        self._serve(frame)
                except EOFError:
                    self._end()
                    return
            if is_watching:
                self._watch()

    def _serve(self, frame: wire.Frame) -> None:
        if frame.kind == wire.SPAWN:
            try:
                self._spawn(frame)
            except Exception as error:
                self._send(wire.FAILED, frame.case, f"{type(error).__name__}: {error}".encode())
                self._kill(frame.case)
                if frame.case not in self._cases:
                    self._send(wire.GONE, frame.case)
            finally:
                for fd in frame.fds:
                    os.close(fd)
        elif frame.kind == wire.KILL:
            self._kill(frame.case)
            if frame.case not in self._cases:
                self._send(wire.GONE, frame.case)

    def _spawn(self, frame: wire.Frame) -> None:
        fds = list(frame.fds)
        ready = []
        for order in wire.decode_orders(frame.body):
            own, fds = fds[: order.num_fds], fds[order.num_fds :]
            ready.append((self._entry(order.entry), own, order))
        if len(ready) > len(self._free):
            raise OSError(f"{_PLACES - len(self._free)} members are under way")
        places = heapq.nsmallest(len(ready), self._free)
        for place, (_, _, order) in zip(places, ready, strict=True):
            self._isolation.prepare(place, order.file_mb)
            self._marks[place * member.MARK : (place + 1) * member.MARK] = bytes(member.MARK)
        memory = self._nursery.memory()
        # One fork after the other: what this process touches between them, it copies once more.
        pids = []
        try:
            for place, (entry, own, order) in zip(places, ready, strict=True):
                pid = self._isolation.fork()
                if pid == 0:
                    self._nursery.run(entry, own, order, place, memory)
                pids.append(pid)
        finally:
            for index, pid in enumerate(pids):
                place = heapq.heappop(self._free)
                pidfd = os.pidfd_open(pid)
                self._running[pidfd] = _Running(pid, frame.case, index, place, ready[index][2])
                self._cases.setdefault(frame.case, set()).add(pidfd)
                self._poll.register(pidfd, select.POLLIN)

    def _entry(self, name: str) -> member.Entry:
        if name not in self._entries:
            module, _, function = name.partition(":")
            self._entries[name] = getattr(importlib.import_module(module), function)
            gc.collect()
            gc.freeze()
        return self._entries[name]

    def _kill(self, case: int) -> None:
        for pidfd in self._cases.get(case, ()):
            running = self._running[pidfd]
            running.is_killed = True
            os.kill(running.pid, signal.SIGKILL)

    def _watch(self) -> None:
        for running in self._running.values():
            if self._isolation.is_over(running.place, running.order.file_mb):
                running.limit = wire.FILE_LIMIT
                os.kill(running.pid, signal.SIGKILL)

    def _reap(self, pidfd: int) -> None:
        running = self._running.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(running.pid, 0)
        self._isolation.clean(running.place)
        heapq.heappush(self._free, running.place)
        case = running.case
        mark = self._marks[running.place * member.MARK : (running.place + 1) * member.MARK]
        cpu_s = usage.ru_utime + usage.ru_stime
        limit = running.limit or _limit(running, status, cpu_s, usage.ru_maxrss)
        was_sought = running.is_killed or limit != wire.NO_LIMIT
        if not mark[0] and not running.is_killed:
            text = mark[1:].rstrip(b"\0") or b"it died"
            self._send(wire.FAILED, case, b"a member was not isolated: " + text)
        elif _was_killed(status) and not was_sought:
            # No member can send this signal, not even to itself: see ``seccomp``.
            self._send(wire.FAILED, case, b"a member was killed from outside")
        else:
            self._send(wire.EXITED, case, wire.EXIT.pack(running.index, status, cpu_s, limit))
        pidfds = self._cases[case]
        pidfds.discard(pidfd)
        if not pidfds:
            del self._cases[case]
            self._send(wire.GONE, case)

    def _end(self) -> None:
        for case in list(self._cases):
            self._kill(case)
        for running in self._running.values():
            os.waitpid(running.pid, 0)
            self._isolation.clean(running.place)
        self._isolation.close()

    def _send(self, kind: int, case: int, body: bytes = b"") -> None:
        data = wire.encode(kind, case, body)
        # The frames are small and the host reads all the time; if it does not, wait for it.
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                select.select([], [self._sock], [])
            except (BrokenPipeError, ConnectionResetError):
                return  # the host is gone: the next read says so


def _limit(running: _Running, status: int, cpu_s: float, max_rss_kb: int) -> int:
    """Which limit ended the member, as far as its status tells."""
    if running.is_killed:
        return wire.NO_LIMIT
    if os.WIFEXITED(status):
        is_out = os.WEXITSTATUS(status) == member.OUT_OF_MEMORY
        return wire.MEMORY_LIMIT if is_out else wire.NO_LIMIT
    # The kernel limits by ticks and reports by clock, which differ on a busy machine.
    if _was_killed(status) and cpu_s >= 0.5 * running.order.cpu_s:
        return wire.CPU_LIMIT
    # A library that cannot allocate aborts, or uses what it did not get; a machine that is short
    # of memory kills whoever has most.
    is_full = max_rss_kb * 1024 >= 0.7 * running.order.memory_mb * member.MIB
    return wire.MEMORY_LIMIT if is_full else wire.NO_LIMIT


def _was_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _isolate(boot: dict, proc: int, sock: socket.socket) -> tuple[member.Isolation, list[int]]:
    """Goes behind the layer, before anything is imported that could start a thread.

    Returns:
      The layer, and the numbers on the machine of the processes around this one.
    """
    if boot["layer"] == "landlock":
        return LandlockIsolation(boot["visible"], boot["base"]), []
    if boot["layer"] == "namespaces":
        build_root(boot["visible"], proc)
    guardian = settle(proc, sock)
    return NamespaceIsolation(proc, boot["visible"]), [guardian]


def _forget_signals() -> None:
    """Undoes what the host blocks or ignores: its members are to start like any program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python's own
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _warm_up(preload: list[str], optional: list[str]) -> None:
    os.environ.update({name: "1" for name in _SINGLE_THREADED})
    _import_random()
    for name in preload:
        importlib.import_module(name)
    for name in optional:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    site.setquit()  # exit() and quit(), which an interpreter started without site lacks
    linux.limit_arenas()
    sys.argv[:] = [""]
    os.environ.clear()


def _import_random() -> None:
    """Every member draws the same numbers, so that the same program gets the same verdict.

    The module would seed itself anew in every fork; its hook is left out while it is imported.
    """
    hook, os.register_at_fork = os.register_at_fork, lambda **_: None
    try:
        importlib.import_module("random").seed(0)
    finally:
        os.register_at_fork = hook


def main() -> None:
    """Runs the server described by the JSON in ``sys.argv[1]``; see ``layers``."""
    boot = json.loads(sys.argv[1])
    sock = socket.socket(fileno=boot["sock"])
    proc = boot["proc"]
    try:
        _forget_signals()
        isolation, pids = _isolate(boot, proc, sock)
        _warm_up(boot["preload"], boot["optional"])
        if isinstance(isolation, LandlockIsolation):
            isolation.give_up_root()
        tasks = os.open("self/task", os.O_RDONLY, dir_fd=proc)
        if len(os.listdir(tasks)) > 1:
            raise RuntimeError("a preloaded module started a thread; such a process cannot fork")
        statm = os.open("self/statm", os.O_RDONLY, dir_fd=proc)
        pids.append(int(os.readlink("self", dir_fd=proc)))
        os.close(tasks)
        os.close(proc)
        server = Server(sock, isolation, statm)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        member.limit_forks()
        seccomp.Filter(seccomp.server_program()).put_on()
        gc.collect()
        gc.freeze()
        gc.disable()
        server.run(pids)
    except BaseException:
        import traceback  # not in the forks

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
