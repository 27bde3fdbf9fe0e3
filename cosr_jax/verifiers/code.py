"""Judges programs: function tests in two processes, scripts by their output.

The tests' process reads the tests over a socket of its own, and the expected output of a script
never leaves this process: nothing that a student's process could read holds an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CATEGORIES, CodeChecks, Completion, Outcome, Task, Verdict
from cosr_jax.verifiers.code_exec import student
from cosr_jax.verifiers.code_exec.report import Report, clip, request
from cosr_jax.verifiers.code_extraction import extract_code
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox.host import Case, Exit, Member, Sandbox, SandboxError

_PACKAGE = "cosr_jax.verifiers.code_exec"
_EXECUTOR = (f"{_PACKAGE}.warmup", f"{_PACKAGE}.script")
#: Each library that a server has makes each of its forks slower, and each one that it lacks those
#: of the cases that use it.  So there are servers of several kinds; the first kind whose words are
#: among those of program and tests serves a case, and any kind can serve it.
_KINDS = (
    (
        re.compile(r"\b(?:numpy\.testing|np\.testing|unittest|asyncio|scipy|pandas|jax|jnp)\b"),
        ("numpy", "numpy.testing", "unittest", "asyncio"),
    ),
    (re.compile(r"\b(?:numpy|np)\b"), ("numpy",)),
    (re.compile(""), ()),
)
#: Seconds in which the end of a process that has hung up becomes known.
_EXIT_S = 1.0
_MAX_REPORT = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Result:
    """What came of a program; ``share`` is that of the tests that it passes, in [0, 1]."""

    outcome: Outcome
    category: str = ""
    detail: str = ""
    share: float = 0.0


class CodeJudge:
    """Judges the domain "code"; see ``judges.Judge``.

    Args:
      config: ``layer`` of isolation, ``partial_credit``, and ``workers`` at once.
    """

    def __init__(self, config: VerifierConfig):
        self._config = config
        self._servers = [
            [_Server(config.layer, libraries) for _ in range(min(2, config.workers))]
            for _, libraries in _KINDS
        ]

    async def start(self) -> None:
        """Starts the first server; the others start when they are needed.

        Raises:
          UserError: the layer of isolation is not to be had here.
        """
        await self._servers[-1][0].start()

    async def close(self) -> None:
        """Ends every process."""
        await asyncio.gather(*(server.close() for kind in self._servers for server in kind))

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict about one program.

        Its ``reward`` is the share of the tests that it passes with ``config.partial_credit``, and
        1 or 0 without.  A test statement that does not use the program earns nothing.  Tests that
        are no Python, or import what is not installed, make it an ERROR.
        """
        start = time.perf_counter()
        checks = task.checks
        if not isinstance(checks, CodeChecks):
            raise TypeError(f"task {task.key!r} has no checks for code")
        found = extract_code(completion.text, checks.entry_point or None, completion.finish_reason)
        if found.category:
            result = _Result(Outcome.FAIL, found.category)
        else:
            try:
                async with self._server_for(found.code, checks).lease() as sandbox:
                    run = _judge_script if checks.io else _judge_function
                    result = await run(
                        sandbox, found.code, checks, limits, self._config.partial_credit
                    )
            except (SandboxError, OSError) as error:
                result = _Result(Outcome.ERROR, detail=f"{type(error).__name__}: {error}")
        is_pass = result.outcome is Outcome.PASS
        share = result.share if self._config.partial_credit else 0.0
        return Verdict(
            outcome=result.outcome,
            reward=1.0 if is_pass else share,
            category=result.category,
            answer=found.code,
            method="" if found.category else "code",
            value_correct=is_pass,
            seconds=time.perf_counter() - start,
            detail=result.detail,
        )

    def _server_for(self, code: str, checks: CodeChecks) -> _Server:
        """The least busy server of the kind that suits the case."""
        texts = (code, *checks.tests)
        kind = next(
            servers
            for servers, (words, _) in zip(self._servers, _KINDS, strict=True)
            if any(words.search(text) for text in texts)
        )
        return min(kind, key=lambda server: server.load)


class _Server:
    """A sandbox that is started when it is needed, and again when it has died.

    It is not renewed otherwise: each case is a fork, and leaves nothing in what it was forked from.
    """

    def __init__(self, layer: str, libraries: Sequence[str]):
        # The executor comes last: it warms up with the libraries that it finds.
        self._sandbox = Sandbox(layer, (*libraries, *_EXECUTOR), libraries=())
        self._lock = asyncio.Lock()
        self.load = 0

    async def start(self) -> None:
        await self._sandbox.start()

    async def close(self) -> None:
        await self._sandbox.close()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Sandbox]:
        """The sandbox, alive when the lease begins."""
        self.load += 1
        try:
            async with self._lock:
                if not self._sandbox.is_alive:
                    await self.start()
            yield self._sandbox
        finally:
            self.load -= 1


@contextlib.asynccontextmanager
async def _spawned(
    sandbox: Sandbox, members: Sequence[Member], ours: Sequence[socket.socket | int]
) -> AsyncIterator[Case]:
    """A case with nothing left of it afterwards; ``ours`` are copies of what the members got."""
    try:
        case = await sandbox.spawn(members)
    finally:
        for each in ours:
            os.close(each) if isinstance(each, int) else each.close()
    try:
        yield case
    finally:
        ending = asyncio.ensure_future(case.kill())
        # A second cancellation leaves it to itself; then nobody else looks at its exception.
        ending.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(ending)


async def _judge_function(
    sandbox: Sandbox, code: str, checks: CodeChecks, limits: Limits, run_all: bool
) -> _Result:
    order = request(checks.tests, checks.entry_point, run_all)
    ours, theirs = socket.socketpair()
    tests_end, program_end = socket.socketpair()
    with ours:
        ours.setblocking(False)
        sent = ours.send(order)
        members = [
            Member(f"{_PACKAGE}.examiner:main", (tests_end.fileno(), theirs.fileno()), b"", limits),
            Member(
                f"{_PACKAGE}.student:main",
                (program_end.fileno(),),
                student.argument(code, limits.output_kb),
                limits,
            ),
        ]
        async with _spawned(sandbox, members, (theirs, tests_end, program_end)) as case:
            lines: list[bytes] = []
            try:
                async with asyncio.timeout(limits.wall_s):
                    if sent < len(order):
                        await asyncio.get_running_loop().sock_sendall(ours, order[sent:])
                    lines = await _read_lines(ours, lines)
            except TimeoutError:
                await _end(case, len(members))
                return _timeout(lines, len(checks.tests), limits)
            except ConnectionError:
                pass  # the tests' process has ended: see how
            report = _last_report(lines)
            if report is None or not report.is_final:
                return _judge_dead_examiner(await case.wait(0))
            if report.trouble:
                return _Result(Outcome.ERROR, detail=report.trouble)
            if not report.category:
                return _Result(Outcome.PASS, share=1.0)
            category, detail = report.category, report.detail
            if report.is_lost:
                category, detail = await _why_lost(case, detail)
            return _Result(Outcome.FAIL, category, detail, _share(report.passed, report.total))


async def _read_lines(sock: socket.socket, lines: list[bytes]) -> list[bytes]:
    """Whole lines until the other end closes; they are put into ``lines`` as they come."""
    loop = asyncio.get_running_loop()
    rest = b""
    while data := await loop.sock_recv(sock, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        lines += whole
        del lines[:-1]
        if len(rest) > _MAX_REPORT:
            break
    return lines


def _last_report(lines: Sequence[bytes]) -> Report | None:
    try:
        return Report.from_line(lines[-1]) if lines else None
    except ValueError:
        return None


async def _end(case: Case, num_members: int) -> None:
    """Ends a case that has run out of time, unless that was the server's doing.

    Raises:
      SandboxError: the server hangs or has died.
    """
    await case.kill()
    for index in range(num_members):
        await case.wait(index)


def _timeout(lines: Sequence[bytes], num_tests: int, limits: Limits) -> _Result:
    report = _last_report(lines) or Report()
    share = _share(report.passed, max(report.total + 1, num_tests))
    return _Result(Outcome.FAIL, "timeout", f"{limits.wall_s:g} s are over", share)


def _share(passed: int, total: int) -> float:
    return passed / total if 0 <= passed < total else 0.0


def _judge_dead_examiner(end: Exit) -> _Result:
    if end.out_of_memory:  # by what the program returned: its data is all that grows there
        return _Result(Outcome.FAIL, "memory_limit", "the tests ran out of memory with the results")
    if end.limit == "cpu":
        return _Result(Outcome.FAIL, "timeout", "the tests ran out of time with the results")
    return _Result(Outcome.ERROR, detail=f"the tests' process ended: {end.detail}")


async def _why_lost(case: Case, detail: str) -> tuple[str, str]:
    """Category and detail of a program whose process has left the conversation."""
    try:
        async with asyncio.timeout(_EXIT_S):
            end = await case.wait(1)
    except TimeoutError:
        return "crash", detail
    category = _category_of_exit(end)
    return category or "crash", end.detail if category or end.code else detail


def _category_of_exit(end: Exit) -> str:
    by_limit = {"memory": "memory_limit", "cpu": "timeout", "files": "output_limit"}
    if end.limit:
        return by_limit[end.limit]
    if end.code == student.OUTPUT_LIMIT_EXIT:
        return "output_limit"
    if end.signal == signal.SIGSYS:
        return "forbidden"
    return "crash" if end.signal is not None else ""


async def _judge_script(
    sandbox: Sandbox, code: str, checks: CodeChecks, limits: Limits, run_all: bool
) -> _Result:
    failure: _Result | None = None
    passed = 0
    for stdin, expected in checks.io:
        result = await _run_script(sandbox, code, stdin, expected, limits)
        if result.outcome is Outcome.ERROR:
            return result
        passed += result.outcome is Outcome.PASS
        if result.outcome is Outcome.FAIL:
            failure = failure or result
            if not run_all:
                break
    if failure is None:
        return _Result(Outcome.PASS, share=1.0)
    return dataclasses.replace(failure, share=_share(passed, len(checks.io)))


async def _run_script(
    sandbox: Sandbox, code: str, stdin: str, expected: str, limits: Limits
) -> _Result:
    given = os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(stdin.encode("utf-8", "surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    printed, stdout = socket.socketpair()
    told, status = socket.socketpair()
    with printed, told:
        printed.setblocking(False)
        told.setblocking(False)
        fds = (given, stdout.fileno(), status.fileno())
        program = code.encode("utf-8", "surrogatepass")
        members = [Member(f"{_PACKAGE}.script:main", fds, program, limits)]
        async with _spawned(sandbox, members, (given, stdout, status)) as case:
            try:
                async with asyncio.timeout(limits.wall_s):
                    output = await _read_output(printed, limits.output_kb << 10)
                    if output is None:
                        detail = f"more than {limits.output_kb} KiB"
                        return _Result(Outcome.FAIL, "output_limit", detail)
                    end = await case.wait(0)
            except TimeoutError:
                await _end(case, len(members))
                return _Result(Outcome.FAIL, "timeout", f"{limits.wall_s:g} s are over")
            if end.code == 0:
                if _lines(output.decode("utf-8", "surrogateescape")) == _lines(expected):
                    return _Result(Outcome.PASS)
                return _Result(Outcome.FAIL, "wrong_answer", _first_difference(output, expected))
            category, detail = _told(told)
            return _Result(
                Outcome.FAIL,
                _category_of_exit(end) or category or "runtime_error",
                detail or end.detail,
            )


async def _read_output(sock: socket.socket, cap: int) -> bytes | None:
    """Everything up to the end of the program; None if it is more than ``cap`` bytes."""
    loop = asyncio.get_running_loop()
    output = bytearray()
    with contextlib.suppress(ConnectionError):  # it ended without reading what it was given
        while data := await loop.sock_recv(sock, 1 << 16):
            output += data
            if len(output) > cap:
                return None
    return bytes(output)


def _told(sock: socket.socket) -> tuple[str, str]:
    """What the failed program said about its exception, if it makes sense."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        category, text = json.loads(sock.recv(4096))
        if category in CATEGORIES and isinstance(text, str):
            return category, clip(text)
    return "", ""


def _lines(text: str) -> list[str]:
    """Lines without trailing blanks, without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _first_difference(output: bytes, expected: str) -> str:
    ours, theirs = _lines(output.decode("utf-8", "replace")), _lines(expected)
    for number, (mine, wanted) in enumerate(zip(ours, theirs, strict=False), 1):
        if mine != wanted:
            return clip(f"line {number} is {mine[:80]!r}, expected {wanted[:80]!r}")
    return f"{len(ours)} lines, expected {len(theirs)}"
