"""Runs both ends once in the server, before it forks.

A fork copies each page of memory that it writes to, and the interpreter writes to code that is new
to it: it counts calls and specialises instructions.  What has run here is read only in the forks.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable

from cosr_jax.verifiers.code_exec.channel import Channel
from cosr_jax.verifiers.code_exec.examiner import Examiner
from cosr_jax.verifiers.code_exec.student import Student

#: The interpreter specialises code after eight calls or so.
_TIMES = 12
_PROGRAM = """
def double(x):
    return x * 2
class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
    def __eq__(self, other):
        return (self.a, self.b) == (other.a, other.b)
def fail(text):
    raise ValueError(text)
"""
_TESTS = (
    "assert double(2) == 4 and double(1.5) == 3.0 and double('a') == 'aa'",
    "assert double([1, {'a': (2, None)}]) == [1, {'a': (2, None)}] * 2",
    "assert Pair(1, 2) == Pair(1, 2) and Pair(1, 2).a == 1",
    "try:\n    fail('no')\nexcept ValueError as error:\n    assert str(error) == 'no'",
)
_ARRAY_TESTS = (
    "import numpy as np\nassert double(np.arange(3.0)).tolist() == [0, 2, 4]",
    "assert double(np.int64(2)) == 4",
)


class _Hand(Channel):
    """Hands frames over within one process."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.frames: collections.deque[bytes] = collections.deque()
        self.other = self
        self.serve: Callable[[], None] = lambda: None

    def send(self, data: bytes | bytearray) -> None:
        self.other.frames.append(bytes(data))
        self.other.serve()

    def receive(self) -> bytes:
        return self.frames.popleft()


def run() -> None:
    """Leaves no trace but a faster interpreter.

    Raises:
      RuntimeError: the tests do not pass.
    """
    main, stdout = sys.modules["__main__"], sys.stdout
    tests = (*_TESTS, *(_ARRAY_TESTS if "numpy" in sys.modules else ()))
    for _ in range(_TIMES):
        tests_end, program_end = _Hand(), _Hand()
        tests_end.other, program_end.other = program_end, tests_end
        student = Student(program_end)
        program_end.serve = student.next_request
        student.run(_PROGRAM)
        report = Examiner(tests_end, "double").run(tests)
        if report.category or report.trouble:
            raise RuntimeError(f"the code executor does not work here: {report}")
    sys.modules["__main__"], sys.stdout = main, stdout
    del sys.modules["solution"]


run()
