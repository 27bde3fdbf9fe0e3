"""The student's end: runs the program as the module ``solution`` and serves what the tests ask.

Nothing here is secret or trusted: the program may do with this process what it wants.
"""

from __future__ import annotations

import io
import linecache
import os
import struct
import sys
import types
from typing import Any

from cosr_jax.verifiers.code_exec import known
from cosr_jax.verifiers.code_exec.channel import Channel, Closed
from cosr_jax.verifiers.code_exec.peer import Peer
from cosr_jax.verifiers.code_exec.wire import WireError

#: Exit codes by which the parent knows what this end has found out about itself.
OUTPUT_LIMIT_EXIT = 87
GARBLED_EXIT = 88

_HEAD = struct.Struct("<I")
FILE = "solution.py"


def argument(code: str, output_kb: int) -> bytes:
    """The argument of ``main``: the program, and how many KiB it may print."""
    return _HEAD.pack(output_kb << 10) + code.encode("utf-8", "surrogatepass")


def main(fds: list[int], argument: bytes) -> None:
    """Runs the program and serves until the tests' side goes away.

    Args:
      fds: the socket to the tests' side.
      argument: as ``argument`` made it.
    """
    (_STDOUT.left,) = (_STDERR.left,) = _HEAD.unpack_from(argument)
    sys.stdout, sys.stderr, sys.stdin = _STREAMS
    student = Student(Channel(fds[0]), _STDOUT)
    student.run(argument[_HEAD.size :].decode("utf-8", "surrogatepass"))
    try:
        while True:
            student.next_request()
    except Closed:
        pass
    except WireError:
        os._exit(GARBLED_EXIT)


class _Output(io.BytesIO):
    """Keeps what is printed; ends the process when more than ``left`` bytes come."""

    left = 0

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            os._exit(OUTPUT_LIMIT_EXIT)
        return super().write(data)

    def take(self) -> bytes:
        if not self.tell():
            return b""
        data = self.getvalue()
        self.seek(0)
        self.truncate()
        return data


# Made before the fork, which then has less to do.
_STDOUT, _STDERR = _Output(), _Output()
_STREAMS = (
    io.TextIOWrapper(_STDOUT, encoding="utf-8", errors="replace", write_through=True),
    io.TextIOWrapper(_STDERR, encoding="utf-8", errors="replace"),
    io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
)


class Student(Peer):
    """Serves the program's objects.

    Args:
      channel: to the tests' side.
      output: what the program prints.
    """

    operations = frozenset(
        ("await", "call", "delete", "dir", "get", "isinstance", "issubclass", "load", "plain")
    ) | {"call_function", "code", "functions", "probe", "set", "signature", "special", "subclass"}

    def __init__(self, channel: Channel, output: _Output | None = None):
        super().__init__(channel, first=1, is_strict=False)
        self._output = output
        self._module = types.ModuleType("solution")
        self._module.__file__ = FILE
        self.register(self._module)
        self._failure: BaseException | None = None
        self._syntax = ""
        self._names: dict[str, Any] = {}

    def run(self, code: str) -> None:
        """Runs the program as a module; how that went is told with the first request."""
        known.prepare_libraries(code)
        sys.modules["solution"] = self._module
        linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
        try:
            compiled = compile(code, FILE, "exec", dont_inherit=True)
        except (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError) as error:
            self._syntax = f"{type(error).__name__}: {error}"
            return
        try:
            exec(compiled, self._module.__dict__)
        except BaseException as error:
            self._failure = error

    def do_load(self, names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        """The values of those names that the program defines.

        Returns:
          The message of a syntax error, else "", and the values by name, which are kept up to date.
        """
        if self._failure is not None:
            raise self._failure
        space = self._module.__dict__
        self._names |= {name: space[name] for name in names if name in space}
        return self._syntax, self._names

    def do_get(self, number: Any, name: Any) -> Any:
        if (number, name) == (0, "__dict__"):  # for ``from solution import *``
            space = self._module.__dict__
            return {k: v for k, v in space.items() if not k.startswith("_")}
        return super().do_get(number, name)

    def before_sending(self) -> None:
        space = self._module.__dict__
        for name, value in self._names.items():
            if space.get(name) is not value and name in space:
                self._names[name] = space[name]

    def take_output(self) -> str:
        return self._output.take().decode("utf-8", "replace") if self._output else ""

    def refuse_large(self) -> None:
        os._exit(OUTPUT_LIMIT_EXIT)
