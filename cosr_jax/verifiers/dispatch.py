"""Calls functions on killable worker processes, and says who is to blame for a failure.

- The worker spent the time computing (at least half of the wall clock in CPU time), or ran out of
  memory: the request is too expensive.  After a second such failure on another worker the call
  ends with that limit, which is a judgement.  A worker that computes, but that a crowded machine
  gave less than half of the time, may go on until it had it, four times the wall clock at most.
- Anything else (the worker slept, died, would not start, or sent something that is no answer) is
  the verifier's own trouble: an answer without value.  Whoever asked may ask again; that reaches
  another worker.

A worker that failed is killed with its process group and replaced.  Workers start when a call needs
them, and retire after a number of requests or when they have grown.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START_S = 120.0  # importing sympy takes a second; a crowded machine may need many
_MAX_FAILED_STARTS = 3
_GIVE_UP_S = 30.0  # after that many failed starts in a row
_MAX_LINE_BYTES = 1 << 20
_MAX_GROWTH_MB = 512
_COMPUTING_SHARE = 0.5
_MAX_STRETCH = 4.0
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a request: a value, the limit that it was too expensive for, or neither.

    Neither is the verifier's own trouble: no judgement, and nobody but the worker is to blame.
    """

    value: dict[str, Any] | None
    limit: str = ""  # "timeout" or "memory_limit"; then there is no value
    detail: str = ""
    seconds: float = 0.0  # wall time on workers, failed attempts included


def worker_command(function: str) -> tuple[str, ...]:
    """The command of a worker that answers with ``function``, "package.module:name"."""
    return (sys.executable, "-m", "cosr_jax.verifiers.worker", function)


#: What the domains ask of workers.  The functions' modules are imported by workers only.
COMMANDS: Mapping[str, Sequence[str]] = {
    "compare": worker_command("cosr_jax.verifiers.comparison:compare"),
    "smt": worker_command("cosr_jax.verifiers.smt:answer"),
    "score": worker_command("cosr_jax.verifiers.gym_scorer:answer"),
}


class Workers:
    """The killable processes of all methods; those of a method start when it is asked for.

    Args:
      count: most processes of one method.
      recycle_after: requests after which a worker is replaced.
      commands: what to run for each method; tests put misbehaving workers here.
    """

    def __init__(
        self,
        count: int,
        recycle_after: int = 1000,
        commands: Mapping[str, Sequence[str]] = COMMANDS,
    ):
        self._count, self._recycle_after, self._commands = count, recycle_after, commands
        self._dispatchers: dict[str, Dispatcher] = {}

    async def ask(
        self, method: str, case: Mapping[str, Any], wall_s: float, memory_mb: int = 512
    ) -> Answer:
        """Answers ``case`` by ``method``, one of ``COMMANDS``.  See ``Dispatcher.call``."""
        if method not in self._dispatchers:
            command = self._commands[method]
            self._dispatchers[method] = Dispatcher(command, self._count, self._recycle_after)
        return await self._dispatchers[method].call(case, wall_s, memory_mb)

    @property
    def restarts(self) -> int:
        """Workers replaced because they failed."""
        return sum(dispatcher.restarts for dispatcher in self._dispatchers.values())

    async def close(self) -> None:
        """Kills all workers."""
        await asyncio.gather(*(dispatcher.close() for dispatcher in self._dispatchers.values()))


class Dispatcher:
    """Keeps up to ``workers`` processes and hands them requests.  Lives on one event loop.

    Args:
      command: what to run as a worker (``worker_command``); ``worker`` describes the protocol.
      workers: most processes at a time; further calls wait.
      recycle_after: requests after which a worker is replaced.
    """

    def __init__(self, command: Sequence[str], workers: int, recycle_after: int = 1000):
        self._command = tuple(command)
        self._recycle_after = recycle_after
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._failed_starts = 0
        self._last_failure = (0.0, "")  # when, and what
        self._is_closed = False
        self.restarts = 0

    async def call(self, case: Mapping[str, Any], wall_s: float, memory_mb: int) -> Answer:
        """Answers ``case``.

        Args:
          case: JSON-serialisable; what the worker's function understands.
          wall_s: wall-clock limit in seconds, from the moment when a worker takes the request.
          memory_mb: MiB that the request may use on top of what the worker holds.
        """
        async with self._slots:
            answer = await self._attempt(case, wall_s, memory_mb)
            if not answer.limit:
                return answer
            again = await self._attempt(case, wall_s, memory_mb)
            return dataclasses.replace(again, seconds=answer.seconds + again.seconds)

    async def close(self) -> None:
        """Kills all workers; a call under way ends without a value."""
        self._is_closed = True
        await asyncio.gather(*(worker.kill() for worker in self._all))
        self._all.clear()

    async def _attempt(self, case: Mapping[str, Any], wall_s: float, memory_mb: int) -> Answer:
        try:
            worker = await self._ready_worker()
            while not worker.send(case, memory_mb):
                await self._replace(worker)  # it died idle, which no request is to blame for
                worker = await self._ready_worker()
        except _Trouble as trouble:
            return Answer(None, detail=str(trouble))
        began = time.monotonic()
        answer = await self._result(worker, wall_s, memory_mb)
        return dataclasses.replace(answer, seconds=time.monotonic() - began)

    async def _result(self, worker: _Worker, wall_s: float, memory_mb: int) -> Answer:
        try:
            message = await worker.receive(wall_s)
        except _Late:
            spent = await self._replace(worker)
            limit = "timeout" if spent >= _COMPUTING_SHARE * wall_s else ""
            return Answer(None, limit, f"no answer within {wall_s:g} s ({spent:.2g} s of CPU time)")
        except _Trouble as trouble:
            await self._replace(worker)
            return Answer(None, detail=str(trouble))
        except BaseException:  # the caller waits no more
            await self._replace(worker)
            raise
        if "limit" in message:
            await self._replace(worker)
            return Answer(None, "memory_limit", f"more than {memory_mb} MiB of memory was needed")
        if worker.served >= self._recycle_after or worker.growth_mb > _MAX_GROWTH_MB:
            await self._remove(worker)
        else:
            self._idle.append(worker)
        if "error" in message:
            return Answer(None, detail=str(message["error"]))
        return Answer(message["result"])

    async def _ready_worker(self) -> _Worker:
        if self._is_closed:
            raise _Trouble("the workers are closed")
        if self._idle:
            return self._idle.pop()
        failed_at, detail = self._last_failure
        if self._failed_starts >= _MAX_FAILED_STARTS:
            if time.monotonic() - failed_at < _GIVE_UP_S:
                raise _Trouble(detail)
            self._failed_starts -= 1  # one more try
        worker = None
        try:
            worker = _Worker(self._command)
            self._all.add(worker)
            await worker.start()
        except (OSError, _Trouble) as error:
            self._failed_starts += 1
            self._last_failure = (time.monotonic(), f"worker did not start: {error}")
            raise _Trouble(self._last_failure[1]) from error
        finally:
            if worker and not worker.is_ready:
                await self._remove(worker)
        self._failed_starts = 0
        return worker

    async def _replace(self, worker: _Worker) -> float:
        self.restarts += 1
        return await self._remove(worker)

    async def _remove(self, worker: _Worker) -> float:
        self._all.discard(worker)
        return await worker.kill()


class _Late(Exception):
    """The time is up."""


class _Trouble(Exception):
    """The worker failed of itself, or would not start."""


class _Worker:
    """One process and the socket to it."""

    def __init__(self, command: Sequence[str]):
        root = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        env["PYTHONPATH"] = os.pathsep.join([root, *([inherited] if inherited else [])])
        env["PYTHONHASHSEED"] = "0"  # sympy's order of terms, and so its time, depends on it
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._stderr,
                env=env,
                start_new_session=True,  # so that the whole group can be killed
            )
        except OSError:
            self._stderr.close()
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._end: asyncio.Future[float] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._cpu_s = 0.0  # as last reported
        self._warm_mb = 0
        self.is_ready = False
        self.growth_mb = 0  # since it was warm
        self.served = 0

    async def start(self) -> None:
        """Returns once the worker is warm.

        Raises:
          _Trouble: it ends, breaks the protocol, or takes too long.
        """
        self._reader, self._writer = await asyncio.open_connection(
            sock=self._socket, limit=_MAX_LINE_BYTES
        )
        try:
            async with asyncio.timeout(_START_S):
                message = await self._message()
        except TimeoutError:
            raise _Trouble(f"it was not ready within {_START_S:g} s") from None
        if message.get("ready") is not True:
            raise _Trouble(f"it sent {message!r:.80}")
        self._warm_mb = message.get("size_mb", 0)
        self.is_ready = True

    def send(self, case: Mapping[str, Any], memory_mb: int) -> bool:
        """Sends a request; False if the worker is found dead."""
        assert self._writer
        if self._reader.at_eof():
            return False
        self.served += 1
        request = {"id": self.served, "memory_mb": memory_mb, "case": case}
        self._writer.write(json.dumps(request).encode() + b"\n")
        return not self._writer.is_closing()

    async def receive(self, wall_s: float) -> dict[str, Any]:
        """The answer to the request sent last.

        Raises:
          _Trouble: the worker ended, or sent something that is no answer to the request.
          _Late: there is no answer in time.
        """
        answer, began = asyncio.ensure_future(self._message()), time.monotonic()
        try:
            deadline = began + wall_s
            while not (await asyncio.wait([answer], timeout=deadline - time.monotonic()))[0]:
                is_running, spent = self._activity()
                missing = _COMPUTING_SHARE * wall_s - spent
                deadline = time.monotonic() + max(missing, 0.02)
                may_go_on = is_running and deadline < began + _MAX_STRETCH * wall_s
                if missing <= 0 or not may_go_on:
                    raise _Late
            message = await answer
        finally:
            answer.cancel()
        is_answer = isinstance(message.get("result"), dict) or {"limit", "error"} & message.keys()
        if message.get("id") != self.served or not is_answer:
            raise _Trouble(f"worker sent {json.dumps(message)[:80]}")
        self.growth_mb = message.get("size_mb", 0) - self._warm_mb
        return message

    def _activity(self) -> tuple[bool, float]:
        """Whether it computes or waits for a core, and the CPU seconds spent on the request; False
        and 0.0 where the system does not tell.
        """
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return False, 0.0
        state, *fields = stat.rpartition(")")[2].split()
        ticks = int(fields[10]) + int(fields[11])
        return state in "RD", ticks / os.sysconf("SC_CLK_TCK") - self._cpu_s

    async def _message(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except ValueError:
            raise _Trouble("worker sent a line without end") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise _Trouble(f"worker ended: {self._last_words()}")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or not _are_numbers(message, "cpu_s", "size_mb"):
            raise _Trouble(f"worker sent {line[:80]!r}")
        self._cpu_s = message.get("cpu_s", self._cpu_s)
        return message

    def _last_words(self) -> str:
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - 300))
        return self._stderr.read().decode(errors="replace").strip() or "no message"

    async def kill(self) -> float:
        """Kills the process group; returns the CPU seconds spent since the last report."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._finish())
        # A caller who is cancelled must not leave the process to itself.
        return await asyncio.shield(self._end)

    async def _finish(self) -> float:
        usage = await asyncio.to_thread(self._kill)
        if self._writer:
            self._writer.transport.abort()  # which closes the socket
        else:
            self._socket.close()
        self._stderr.close()
        return usage.ru_utime + usage.ru_stime - self._cpu_s

    def _kill(self) -> resource.struct_rusage:
        # On some systems a group whose leader only waits to be reaped is gone already.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return usage


def _are_numbers(message: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(message.get(name, 0.0), (int, float)) for name in names)
