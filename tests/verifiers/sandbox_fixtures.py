"""Sandboxes for tests: one warm server for each layer that this machine has."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import probe
from cosr_jax.verifiers.sandbox.host import Case, Exit, Member, Sandbox

LAYERS = ("bubblewrap", "namespaces", "landlock")
PROGRAM = "cosr_jax.verifiers.sandbox.selftest:program"
LIMITS = Limits(wall_s=10.0, memory_mb=128, file_mb=2)


@dataclasses.dataclass
class Ended:
    """How a program ended, and what it wrote to its first descriptor."""

    exit: Exit
    said: str


class Box:
    """A sandbox and the event loop that drives it."""

    def __init__(self, layer: str):
        self.layer = layer
        self.runner = asyncio.Runner()
        self.sandbox = Sandbox(layer)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs on the sandbox's loop."""
        return self.runner.run(coroutine)

    def execute(self, code: str, limits: Limits = LIMITS) -> Ended:
        """Runs ``code`` as the only member of a case, until it ends."""

        async def once() -> Ended:
            async with self.started(code, limits=limits) as (case, (ours,)):
                return Ended(*await asyncio.gather(case.wait(0), _read_all(ours)))

        return self.run(asyncio.wait_for(once(), 60.0))

    @contextlib.asynccontextmanager
    async def started(
        self, *codes: str, limits: Limits = LIMITS
    ) -> AsyncIterator[tuple[Case, list[socket.socket]]]:
        """A case with a member for each program, and a socket to the ``fds[0]`` of each.

        The case is killed at the end.  ``fds[1]`` of two members are joined.
        """
        with contextlib.ExitStack() as stack:
            pairs = [socket.socketpair() for _ in codes]
            for ours, _ in pairs:
                ours.setblocking(False)
                stack.enter_context(ours)
            with contextlib.ExitStack() as given:
                joined = [given.enter_context(end) for end in socket.socketpair()]
                members = []
                for code, (_, theirs), end in zip(codes, pairs, [*joined, None], strict=False):
                    given.enter_context(theirs)
                    fds = [theirs.fileno(), *([end.fileno()] if end else [])]
                    members.append(Member(PROGRAM, tuple(fds), code.encode(), limits))
                case = await self.sandbox.spawn(members)
            try:
                yield case, [ours for ours, _ in pairs]
            finally:
                await case.kill()


async def _read_all(sock: socket.socket) -> str:
    loop = asyncio.get_running_loop()
    parts = []
    while part := await loop.sock_recv(sock, 1 << 16):
        parts.append(part)
    return b"".join(parts).decode()


@contextlib.contextmanager
def open_box(layer: str) -> Iterator[Box]:
    """A box whose sandbox runs; skips the test where the layer does not work."""
    box = Box(layer)
    with box.runner:
        reason = box.run(probe.probe(layer))
        if reason:
            pytest.skip(f"{layer} does not work here: {reason}")
        box.run(box.sandbox.start())
        try:
            yield box
        finally:
            box.run(box.sandbox.close())


def strongest() -> str:
    """The layer that "auto" takes here."""
    return asyncio.run(probe.choose("auto"))


def descendants(root=None):
    """Process ids below this process, as /proc tells."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
    found = {root or os.getpid()}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root or os.getpid()}


def servers(box):
    """The server and what runs around it."""
    pid = box.sandbox._server._process.pid
    return {pid} | descendants(pid)
