"""``cosr verify --stdio``: a case a line on stdin, an answer a line on stdout, in any order.

``wire`` describes both.  Nothing else ever reaches stdout: answers go to a private copy of it, and
stdout itself to stderr, for this process and all that it starts.  A line that is no case gets the
verdict "error" with its id if that can be read, and the reason on stderr.  At the end of input the
cases under way are answered, then everything ends.

Reading waits while too many cases are under way, but never for the reader of the answers: who
writes all cases before reading any answer is served too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cosr_jax.config import VerifierConfig
from cosr_jax.types import UserError, Verdict
from cosr_jax.verifiers import wire
from cosr_jax.verifiers.front import Front, config_limits
from cosr_jax.verifiers.pool import make_front

#: Longer lines are answered with "error" without being read as JSON.
MAX_LINE_BYTES = 64 << 20

_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def serve(config: VerifierConfig) -> int:
    """Serves until the end of input; returns the exit code.

    Returns:
      0 at the end of input, 141 when nobody reads the answers any more, 143 after SIGTERM.
    """
    channel = os.dup(1)
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    return asyncio.run(_Session(config, 0, channel).run())


@dataclasses.dataclass(frozen=True)
class _TooLong:
    """Stands for a line over ``MAX_LINE_BYTES``."""

    head: bytes


class _Session:
    """One input and its answers."""

    def __init__(self, config: VerifierConfig, source: int, sink: int):
        self._config = config
        self._defaults = config_limits(config)
        self._source, self._sink = source, sink
        self._room = threading.Semaphore(config.queue)  # cases under way
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._cases: set[asyncio.Task[None]] = set()
        self._at_end = asyncio.Event()
        self._all_written = asyncio.Event()
        self._exit_code = 0

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        # Not add_signal_handler: it sends the signal through the pipe that wakes the loop, and one
        # that finds the pipe full, of lines that were read while the loop was busy, is lost.
        signal.signal(signal.SIGTERM, self._on_signal)
        self._front: Front = make_front(self._config)
        threading.Thread(target=self._write, daemon=True).start()
        try:
            await self._front.start()
            threading.Thread(target=self._read, daemon=True).start()
            await self._at_end.wait()
            while self._cases:
                await asyncio.wait(self._cases)
            self._answers.put(None)
            await self._all_written.wait()
        except asyncio.CancelledError:
            if not self._exit_code:
                raise  # Ctrl-C
        finally:
            for case in self._cases:
                case.cancel()
            await asyncio.gather(*self._cases, return_exceptions=True)
            await self._front.close()
        return self._exit_code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._leave(128 + number)
        self._call(lambda: None)  # wakes the loop

    def _leave(self, exit_code: int) -> None:
        self._exit_code = exit_code
        assert self._main
        self._main.cancel()

    def _read(self) -> None:
        """Hands the lines of the input to the event loop, as far as there is room."""
        try:
            for line in _lines(self._source):
                self._room.acquire()
                self._call(self._accept, line)
        finally:
            self._call(self._at_end.set)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _accept(self, line: bytes | _TooLong) -> None:
        case = self._loop.create_task(self._judge(line))
        self._cases.add(case)
        case.add_done_callback(self._cases.discard)

    async def _judge(self, line: bytes | _TooLong) -> None:
        try:
            if isinstance(line, _TooLong):
                raise wire.BadCase(
                    f"a line of more than {MAX_LINE_BYTES} bytes", wire.salvaged_id(line.head)
                )
            case = wire.parse_case(line, self._defaults)
        except wire.BadCase as error:
            self._answer(error.case_id, wire.error_verdict(str(error)), False)
            return
        try:
            verdict = await self._front.judge(case.task, case.completion, case.limits)
        except UserError as error:
            verdict = wire.error_verdict(str(error))
        except Exception as error:  # a fault of ours; every case gets its answer all the same
            _log.exception("could not judge")
            verdict = wire.error_verdict(f"{type(error).__name__}: {error}")
        self._answer(case.id, verdict, case.is_verbose)

    def _answer(self, case_id: object, verdict: Verdict, is_verbose: bool) -> None:
        answer = wire.answer_dict(case_id, verdict, is_verbose)
        if answer["verdict"] == "error":
            print(f"cosr verify: {case_id!r:.100}: {verdict.detail}", file=sys.stderr)
        self._answers.put(json.dumps(answer).encode() + b"\n")
        self._room.release()

    def _write(self) -> None:
        """Writes answers as they come; in a thread, because the reader may be slow."""
        while (line := self._answers.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._sink, line) :]
            except BrokenPipeError:
                self._call(self._leave, 141)
                return
        self._call(self._all_written.set)


def _lines(source: int) -> Iterator[bytes | _TooLong]:
    """The lines of a file descriptor that are not blank, without their ends."""
    # Not through sys.stdin: a thread that reads it when the interpreter ends aborts the process.
    parts: list[bytes] = []
    size = 0
    while chunk := os.read(source, _CHUNK_BYTES):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            size += len(end)
            if line := _joined(parts, size):
                yield line
            parts, size = [], 0
        size += len(rest)
        if size <= MAX_LINE_BYTES or not parts:
            parts.append(rest)
    if line := _joined(parts, size):
        yield line


def _joined(parts: list[bytes], size: int) -> bytes | _TooLong:
    return _TooLong(parts[0]) if size > MAX_LINE_BYTES else b"".join(parts).strip()
