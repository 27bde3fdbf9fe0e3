# ruff: noqa: PTH208
"""Entries that the layers' probe and the package's tests run inside a sandbox."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable


def echo(fds: list[int], argument: bytes) -> None:
    """Writes its argument to its first descriptor."""
    os.write(fds[0], argument)


def escape(fds: list[int], argument: bytes) -> None:
    """Tries what no program in a sandbox may do; writes what it could, as a JSON list.

    Nothing here does harm where a layer lets it through.
    """
    attempts: dict[str, Callable[[], object]] = {
        "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "start a process": _fork,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "list the root of the machine": lambda: os.listdir("/etc/ssl"),
        "read the accounts": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "see processes": lambda: os.open("/proc/self/environ", os.O_RDONLY),
        "write beside its directory": lambda: os.open(os.__file__, os.O_WRONLY),
        "signal its parent": lambda: os.kill(os.getppid() or 1 << 22, 0),
    }
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        done.append(name)
    os.write(fds[0], json.dumps(done).encode())


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def program(fds: list[int], argument: bytes) -> None:
    """Runs its argument as a Python program that knows its descriptors as ``fds``.

    An exception is written to the first descriptor, as "<type> <errno>"; it ends the member with
    exit code 1 as in any entry, and MemoryError as a want of memory.
    """
    try:
        exec(compile(argument, "<program>", "exec"), {"fds": fds, "__name__": "program"})
    except Exception as error:
        os.write(fds[0], f"{type(error).__name__} {getattr(error, 'errno', '')}".encode())
        raise
