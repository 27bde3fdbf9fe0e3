"""A program that reads standard input and writes standard output, as its own process."""

from __future__ import annotations

import atexit
import io
import json
import linecache
import os
import sys
import types
from typing import Any

from cosr_jax.verifiers.code_exec import known
from cosr_jax.verifiers.code_exec.failures import category_of

FILE = "main.py"
_MAX_TEXT = 500


def main(fds: list[int], argument: bytes) -> None:
    """Runs the program as ``__main__`` and ends the process with its exit code.

    An uncaught exception is told to the parent, which believes it only of a program that failed.

    Args:
      fds: what becomes standard input and output, and a socket to the parent.
      argument: the program.
    """
    stdin, stdout, parent = fds
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8")
    sys.argv = [FILE]
    atexit._clear()  # what the server has to do at its end
    code, category, text = _run(argument.decode("utf-8", "surrogatepass"))
    if category:
        os.write(parent, json.dumps([category, text[:_MAX_TEXT]]).encode())
    os._exit(code)


def _run(source: str) -> tuple[int, str, str]:
    """Exit code, category and message, the latter two empty without an exception."""
    known.prepare_libraries(source)
    try:
        program = compile(source, FILE, "exec", dont_inherit=True)
    except (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError) as error:
        return 1, "syntax_error", f"{type(error).__name__}: {error}"
    module = types.ModuleType("__main__")
    module.__file__ = FILE
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = module
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    try:
        try:
            exec(program, module.__dict__)
        finally:
            if threading := sys.modules.get("threading"):
                threading._shutdown()  # waits for threads, as an interpreter does at its end
            atexit._run_exitfuncs()
            sys.stdout.flush()
    except SystemExit as error:
        code = _exit_code(error.code)
        return code, "runtime_error" if code else "", f"exit code {code}"
    except BaseException as error:
        return 1, category_of(error), f"{type(error).__name__}: {error}"
    return 0, "", ""


def _exit_code(code: Any) -> int:
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1
