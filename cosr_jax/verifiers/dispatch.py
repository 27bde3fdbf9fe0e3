"""Runs symbolic comparisons on killable worker processes, and says who is to blame for a failure.

- The worker spent the time computing (at least half of the wall clock in CPU time), or ran out of
  memory: the answer is too expensive to compare.  After a second such failure on a fresh worker
  the comparison ends with that limit, which is a judgement.
- Anything else (the worker slept, died, would not start, or sent something that is no answer) is
  the verifier's own trouble: once more on a fresh worker, then the comparison stays unjudged.

A worker that failed is killed with its process group and replaced.  Workers start when the first
comparison needs them, and everything happens in the calling thread.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ATTEMPTS = 2
_START_S = 120.0  # importing sympy takes a second; a crowded machine may need many
_MAX_FAILED_STARTS = 3
_MAX_LINE_BYTES = 1 << 16
_COMPUTING_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What became of one comparison; ``agree`` None with no ``limit`` is no judgement."""

    agree: bool | None
    limit: str = ""  # "timeout" or "memory_limit": the answer was too expensive to compare
    detail: str = ""
    seconds: float = 0.0  # wall time on workers, failed attempts included


class Dispatcher:
    """Keeps up to ``workers`` processes and hands them comparisons.

    Args:
      command: what to run as a worker; ``cosr_jax.verifiers.worker`` describes the protocol.
      workers: most processes at a time.
      wall_s: wall-clock limit of one comparison, in seconds.
    """

    def __init__(self, command: Sequence[str], workers: int, wall_s: float):
        self._command = tuple(command)
        self._max_workers = workers
        self._wall_s = wall_s
        self._workers: list[_Worker] = []
        self.retries = 0
        self.restarts = 0

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """Compares (given, gold) pairs, in order."""
        jobs = [_Job(given, gold) for given, gold in pairs]
        waiting = collections.deque(jobs)
        failed_starts: list[str] = []
        try:
            while any(job.result is None for job in jobs):
                self._assign(waiting)
                if len(failed_starts) < _MAX_FAILED_STARTS:
                    self._start(len(waiting), failed_starts)
                elif not self._workers:
                    for job in waiting:
                        job.result = Comparison(None, detail=failed_starts[-1])
                    break
                for worker in self._wait():
                    self._step(worker, waiting, failed_starts)
        finally:
            for worker in [w for w in self._workers if w.job]:
                self._remove(worker)  # an exception, such as Ctrl-C, left it busy
        return [job.result for job in jobs if job.result]

    def close(self) -> None:
        """Kills all workers."""
        for worker in list(self._workers):
            self._remove(worker)

    def _assign(self, waiting: collections.deque[_Job]) -> None:
        for worker in list(self._workers):
            if not waiting or worker.job or not worker.is_ready:
                continue
            if not worker.take(waiting[0], self._wall_s):
                self._remove(worker)  # it died idle, which no comparison is to blame for
                self.restarts += 1
                continue
            waiting.popleft()

    def _start(self, num_waiting: int, failed_starts: list[str]) -> None:
        starting = sum(not worker.is_ready for worker in self._workers)
        room = self._max_workers - len(self._workers)
        for _ in range(min(room, num_waiting - starting)):
            try:
                self._workers.append(_Worker(self._command))
            except OSError as error:
                failed_starts.append(f"worker did not start: {error}")
                return

    def _wait(self) -> list[_Worker]:
        """Workers that have something to read, or whose time is up."""
        active = [worker for worker in self._workers if worker.job or not worker.is_ready]
        if not active:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            timeout = min(worker.deadline for worker in active) - time.monotonic()
            readable = {key.data for key, _ in selector.select(max(0.0, timeout))}
        now = time.monotonic()
        return [worker for worker in active if worker in readable or worker.deadline <= now]

    def _step(
        self, worker: _Worker, waiting: collections.deque[_Job], failed_starts: list[str]
    ) -> None:
        try:
            message = worker.receive()
        except _BadWorkerError as error:
            if worker.job is None:
                failed_starts.append(f"worker did not start: {error}")
            self._replace(worker, waiting, _Fault("", str(error)))
            return
        if message is None:
            if worker.deadline <= time.monotonic():
                self._time_out(worker, waiting, failed_starts)
        elif worker.job is None:
            failed_starts.clear()
            worker.is_ready = True
        elif "limit" in message:
            self._replace(worker, waiting, _Fault("memory_limit", "comparison ran out of memory"))
        elif "error" in message:
            self._replace(worker, waiting, _Fault("", str(message["error"])))
        else:
            job = worker.finish()
            detail = str(message.get("detail", ""))
            job.result = Comparison(message["agree"], detail=detail, seconds=job.seconds)

    def _time_out(
        self, worker: _Worker, waiting: collections.deque[_Job], failed_starts: list[str]
    ) -> None:
        if worker.job is None:
            failed_starts.append(f"worker did not start within {_START_S:g} s")
        spent = self._remove(worker)
        self.restarts += 1
        if worker.job is None:
            return
        is_computing = spent >= _COMPUTING_SHARE * self._wall_s
        detail = f"no answer within {self._wall_s:g} s ({spent:.2g} s of CPU time)"
        self._fail(worker.finish(), waiting, _Fault("timeout" if is_computing else "", detail))

    def _replace(self, worker: _Worker, waiting: collections.deque[_Job], fault: _Fault) -> None:
        self._remove(worker)
        self.restarts += 1
        if worker.job:
            self._fail(worker.finish(), waiting, fault)

    def _fail(self, job: _Job, waiting: collections.deque[_Job], fault: _Fault) -> None:
        job.faults.append(fault)
        if len(job.faults) < _ATTEMPTS:
            self.retries += 1
            waiting.append(job)
            return
        limit = fault.limit if all(f.limit for f in job.faults) else ""
        job.result = Comparison(
            False if limit else None, limit=limit, detail=fault.detail, seconds=job.seconds
        )

    def _remove(self, worker: _Worker) -> float:
        self._workers.remove(worker)
        return worker.kill()


@dataclasses.dataclass(frozen=True)
class _Fault:
    limit: str  # "" if the verifier is to blame
    detail: str


@dataclasses.dataclass(eq=False)
class _Job:
    given: str
    gold: str
    faults: list[_Fault] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    result: Comparison | None = None


class _BadWorkerError(Exception):
    """The worker died or broke the protocol."""


class _Worker:
    """One process and its pipes."""

    def __init__(self, command: Sequence[str]):
        root = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *([inherited] if inherited else [])]),
            "PYTHONHASHSEED": "0",  # sympy's order of terms, and so its time, depends on it
        }
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=env,
                bufsize=0,
                start_new_session=True,  # so that the whole group can be killed
            )
        except OSError:
            self._stderr.close()
            raise
        assert self._process.stdin and self._process.stdout
        self._input, self.output = self._process.stdin, self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.is_ready = False
        self.job: _Job | None = None
        self.deadline = time.monotonic() + _START_S
        self._began = 0.0
        self._cpu_s = 0.0  # as last reported
        self._case_id = 0
        self._received = b""

    def take(self, job: _Job, wall_s: float) -> bool:
        """Sends a comparison; False if the worker is found dead."""
        self._case_id += 1
        case = {"id": self._case_id, "given": job.given, "gold": job.gold}
        try:
            self._input.write(json.dumps(case).encode() + b"\n")
        except BrokenPipeError:
            return False
        self.job = job
        self._began = time.monotonic()
        self.deadline = self._began + wall_s
        return True

    def finish(self) -> _Job:
        """The job, with the time spent added; the worker is free again."""
        job, self.job = self.job, None
        assert job is not None
        job.seconds += time.monotonic() - self._began
        return job

    def receive(self) -> dict[str, Any] | None:
        """The next message, checked; None if it is not complete yet.

        Raises:
          _BadWorkerError: end of output, or something that is no message for the current case.
        """
        chunk = self.output.read(_MAX_LINE_BYTES)
        if chunk == b"":
            raise _BadWorkerError(f"worker ended: {self._last_words()}")
        self._received += chunk or b""
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            if len(line) > _MAX_LINE_BYTES:
                raise _BadWorkerError("worker sent a line without end")
            return None
        self._received = b""
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if rest or not isinstance(message, dict) or not self._is_expected(message):
            raise _BadWorkerError(f"worker sent {line[:80]!r}")
        self._cpu_s = message.get("cpu_s", self._cpu_s)
        return message

    def _is_expected(self, message: dict[str, Any]) -> bool:
        if not isinstance(message.get("cpu_s", 0.0), (int, float)):
            return False
        if self.job is None:
            return message.get("ready") is True
        if message.get("id") != self._case_id:
            return False
        return isinstance(message.get("agree"), bool) or bool({"limit", "error"} & message.keys())

    def _last_words(self) -> str:
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - 300))
        return self._stderr.read().decode(errors="replace").strip() or "no message"

    def kill(self) -> float:
        """Kills the process group; returns the CPU seconds spent since the last report."""
        # On some systems a group whose leader only waits to be reaped is gone already.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        for file in (self._input, self.output, self._stderr):
            file.close()
        return usage.ru_utime + usage.ru_stime - self._cpu_s
