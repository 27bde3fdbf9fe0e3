"""The tests' end: runs the test statements and says how they went.

Everything that comes from the student's side is data to be doubted: see ``proxies`` for what is
believed.  A student's side that ends, hangs up or sends garbage has failed, whatever the tests
catch.
"""

from __future__ import annotations

import _thread
import builtins
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cosr_jax.verifiers.code_exec import known, proxies
from cosr_jax.verifiers.code_exec.channel import Channel, Closed
from cosr_jax.verifiers.code_exec.failures import category_of
from cosr_jax.verifiers.code_exec.handles import TEXT
from cosr_jax.verifiers.code_exec.peer import Lost, Peer
from cosr_jax.verifiers.code_exec.report import NO_LINK, Report, clip
from cosr_jax.verifiers.code_exec.ties import set_on_exception, trust_class
from cosr_jax.verifiers.code_exec.wire import Reader, TooLargeError, WireError

_TESTS = "<tests>"
_OF_STUDENT = "_cosr_of_student"

#: Attributes of our functions and classes that the student's side may read.
_READABLE = frozenset(("__name__", "__qualname__", "__doc__", "__module__"))
#: How Python's own types call the frames and codes that lead to everything else.
_INNER = ("gi_", "cr_", "ag_", "f_", "tb_", "co_", "func_")


def main(fds: list[int], argument: bytes) -> None:
    """Reads a ``request`` from the parent, runs it, and writes reports to the parent.

    The last report counts; with ``run_all`` there is one after each statement, for the case that
    time runs out.

    Args:
      fds: the socket to the student's side and the one to the parent.
      argument: nothing; tests do not go through the server, whose forks run students.
    """
    channel, parent = fds
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        part = os.read(parent, 1 << 16)
        if not part:
            return
        data += part
    tests, entry_point, run_all = Reader(data[4:], NO_LINK).value()
    known.prepare_libraries("\n".join(tests))
    examiner = Examiner(Channel(channel), entry_point)

    def tell(report: Report) -> None:
        line = report.to_line()
        while line:
            line = line[os.write(parent, line) :]

    report = examiner.run(tests, run_all, tell)
    report.is_final = True
    tell(report)


class Examiner(Peer):
    """Runs tests against the program on the other side.

    Args:
      channel: to the student's side.
      entry_point: the name that the program must define.
    """

    operations = frozenset(
        ("await", "call", "delete", "get", "isinstance", "issubclass", "set", "signature")
    ) | {"code", "special"}

    def __init__(self, channel: Channel, entry_point: str):
        super().__init__(channel, first=0, is_strict=True)
        self._entry_point = entry_point.partition(".")[0].partition("(")[0].strip()
        self._lock = _thread.RLock()
        self._lost: tuple[str, str] | None = None
        self._asked = 0
        self._names: dict[str, Any] = {}
        self._bound: dict[str, Any] = {}
        self._space: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}

    # Running.

    def run(
        self,
        tests: Sequence[str],
        run_all: bool = False,
        tell: Callable[[Report], None] = lambda report: None,
    ) -> Report:
        """Runs the statements, and afterwards the test functions that nobody has called.

        Args:
          tests: Python source, each a test of the same worth; they share their globals.
          run_all: go on behind a failed one.
          tell: is given the report so far, after each statement if ``run_all``.
        """
        report = Report()
        try:
            codes = [compile(text, _TESTS, "exec", dont_inherit=True) for text in tests]
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            report.trouble = clip(f"the tests are no Python: {error}")
            return report
        names = frozenset().union(*map(_names, codes), [self._entry_point])
        if not self._load(sorted(names), report):
            return report
        used = [bool(_names(code) & {*self._bound, "solution"}) for code in codes]
        units = [
            (_executor(code, self._space), text, is_used)
            for code, text, is_used in zip(codes, tests, used, strict=True)
        ]
        for execute, text, is_used in _and_then(units, lambda: self._uncalled(tests)):
            if not self._run_one(execute, text, is_used, report) and not run_all:
                break
            if report.trouble:
                break
            if run_all:
                tell(report)
        if not report.total and not report.trouble:
            report.trouble = "the tests never use the program"
        if self._lost and not report.category:
            report.total += 1
            report.category, report.detail = self._lost
            report.is_lost = True
        return report

    def _load(self, names: list[str], report: Report) -> bool:
        report.total = 1
        try:
            syntax, values = self.ask("load", tuple(names))
        except Lost:
            self._fail(report, Lost(), "")
            return False
        except BaseException as error:
            self._fail(report, error, "")
            return False
        if type(syntax) is not str or type(values) is not dict:
            report.category, report.detail = "crash", "an answer that is none"
            return False
        if syntax:
            report.category, report.detail = "syntax_error", clip(syntax)
            return False
        if self._entry_point and self._entry_point not in values:
            report.category = "missing_entry_point"
            report.detail = clip(f"the program defines no {self._entry_point!r}")
            return False
        report.total = 0
        module = proxies.make_module(self)
        sys.modules["solution"] = module
        main = types.ModuleType("__main__")
        main.__dict__.update(self._space)
        self._space = main.__dict__
        sys.modules["__main__"] = main
        self._space["solution"] = module
        self._names = values
        self._bind()
        if self._entry_point in values:  # the customary name of what is tested
            self._space["candidate"] = self._space[self._entry_point]
        return True

    def _bind(self) -> None:
        """Gives tests the program's names, and their new values when they change."""
        for name, value in self._names.items():
            if type(name) is not str or (name in self._bound and self._bound[name] is value):
                continue
            # The program cannot lend tests its own ``abs`` or ``math``.
            is_free = name == self._entry_point or not (
                name.startswith("_")
                or hasattr(builtins, name)
                or (name in known.MODULE_NAMES and not known.is_module_called(value, name))
            )
            is_ours = name in self._bound and self._space.get(name) is not self._bound[name]
            if is_free and not is_ours:
                if name[0].isupper():
                    trust_class(value)
                self._space[name] = self._bound[name] = value

    def _run_one(
        self, execute: Callable[[], None], source: str, is_used: bool, report: Report
    ) -> bool:
        asked = self._asked
        try:
            execute()
        except BaseException as error:
            if _is_skip(error):
                return True
            if not (type(error) is SystemExit and _has_succeeded(error)):
                report.total += 1
                self._fail(report, error, source)
                return False
        if self._lost:  # the tests have caught what they must not
            report.total += 1
            self._fail(report, Lost(), source)
            return False
        if is_used or self._asked > asked:
            report.total += 1
            report.passed += 1
        return True

    def _uncalled(self, tests: Sequence[str]) -> Iterator[tuple[Callable[[], None], str, bool]]:
        """Test functions and classes that the statements define but leave to a runner."""
        text = "\n".join(tests)
        for name, value in list(self._space.items()):
            if name in self._bound and value is self._bound[name]:
                continue
            if type(value) is types.FunctionType and value.__module__ == "__main__":
                is_called = text.count(f"{name}(") > 1
                required = _count_required(value)
                if name.startswith("test") and not is_called and required == 0:
                    yield value, name, True
                elif name == "check" and not is_called and required == 1:
                    candidate = self._space.get(self._entry_point)
                    yield functools.partial(value, candidate), name, True
            elif _is_test_case(value) and "unittest.main(" not in text:
                for method in dir(value):
                    if method.startswith("test") and callable(getattr(value, method)):
                        yield _unittest(value, method), f"{name}.{method}", True

    def _fail(self, report: Report, error: BaseException, source: str) -> None:
        if report.category or report.trouble:
            return
        if isinstance(error, Lost):
            category, detail = self._lost or ("crash", "")
            report.is_lost = category == "crash"
        elif getattr(error, _OF_STUDENT, False):
            category = category_of(error)
            detail = f"{type(error).__name__}: {getattr(error, TEXT, '')}"
        elif isinstance(error, ModuleNotFoundError):
            report.trouble = clip(f"the tests import what is not there: {error}")
            return
        elif isinstance(error, MemoryError):
            category, detail = "memory_limit", "the tests ran out of memory with the results"
        elif isinstance(error, (NameError, ImportError)):
            category, detail = "missing_entry_point", f"{type(error).__name__}: {error}"
        else:
            category = "wrong_answer"
            detail = f"{type(error).__name__}: {_text_of(error)} in {_line_of(error, source)}"
        report.category, report.detail = category, clip(detail)

    # The conversation.

    def ask(self, operation: str, *arguments: Any) -> Any:
        with self._lock:
            if self._lost:
                raise Lost
            self._asked += 1
            try:
                return super().ask(operation, *arguments)
            except Closed:
                self._lost = ("crash", "the program's process ended or hung up")
            except TooLargeError as error:
                self._lost = ("output_limit", f"the program sent {error}")
            except WireError as error:
                self._lost = ("crash", f"the program sent {error}")
            raise Lost

    def do_get(self, number: Any, name: Any) -> Any:
        self._check_open(number, name, is_change=False)
        return super().do_get(number, name)

    def do_set(self, number: Any, name: Any, value: Any) -> None:
        self._check_open(number, name, is_change=True)
        super().do_set(number, name, value)

    def do_delete(self, number: Any, name: Any) -> None:
        self._check_open(number, name, is_change=True)
        super().do_delete(number, name)

    def _check_open(self, number: Any, name: Any, is_change: bool) -> None:
        if type(name) is not str or not _is_open(self.own(number), name, is_change):
            raise AttributeError(f"the tests keep {name!r} to themselves")

    def raised(self, error: BaseException) -> None:
        set_on_exception(error, _OF_STUDENT, True)

    def give_output(self, text: str) -> None:
        sys.stdout.write(text)

    def after_receiving(self) -> None:
        if self._bound:
            self._bind()

    def may_swallow(self, error: Any, trace: Any) -> bool:
        """Only what the tests raised on purpose: never a failed assertion, nor a mishap."""
        if error is None:
            return True
        if isinstance(error, AssertionError) or getattr(error, _OF_STUDENT, False):
            return False
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is None or trace.tb_frame.f_code.co_filename != _TESTS:
            return False
        import dis

        operation = trace.tb_frame.f_code.co_code[trace.tb_lasti]
        return isinstance(error, ZeroDivisionError) or dis.opname[operation] == "RAISE_VARARGS"


def _is_open(target: Any, name: str, is_change: bool) -> bool:
    """Whether the student's side may use an attribute of an object of the tests.

    What the tests' own classes hold is the student's to use, as when both live in one process.
    Functions, generators and library objects lead to frames and globals, so only harmless names of
    theirs are open.
    """
    if name.startswith("__"):
        return name in _READABLE and not is_change
    kind = type(target)
    if isinstance(target, type):
        return not is_change and not name.startswith("_")
    if kind.__module__ == "__main__":
        return True
    if kind is types.FunctionType:
        return not name.startswith(("_", *_INNER))
    if kind in (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType):
        return not is_change and name in ("send", "throw", "close", "asend", "athrow", "aclose")
    if kind in (types.FrameType, types.CodeType, types.TracebackType, types.ModuleType):
        return False
    return not name.startswith(("_", *_INNER))


def _executor(code: types.CodeType, space: dict[str, Any]) -> Callable[[], None]:
    return lambda: exec(code, space)


def _and_then(first: Sequence[Any], then: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    yield from first
    yield from then()


def _names(code: types.CodeType) -> frozenset[str]:
    """Every name that a code object uses, at any depth."""
    names, pending = set[str](), [code]
    while pending:
        each = pending.pop()
        names.update(each.co_names)
        pending += [c for c in each.co_consts if isinstance(c, types.CodeType)]
    return frozenset(names)


def _count_required(function: types.FunctionType) -> int:
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in kinds for p in parameters)


def _is_test_case(value: Any) -> bool:
    unittest = sys.modules.get("unittest")
    return (
        unittest is not None
        and isinstance(value, type)
        and issubclass(value, unittest.TestCase)
        and value.__module__ == "__main__"
    )


def _unittest(case: Any, method: str) -> Callable[[], None]:
    def run() -> None:
        case(method).debug()

    return run


def _has_succeeded(error: SystemExit) -> bool:
    """Whether a test runner ended the statements on purpose; the student's exits do not count."""
    return not getattr(error, _OF_STUDENT, False) and error.code in (None, 0, False)


def _is_skip(error: BaseException) -> bool:
    """Whether a test asks to be left out; the student's exceptions ask for nothing."""
    unittest = sys.modules.get("unittest")
    is_ours = unittest is not None and type(error) is unittest.SkipTest
    return is_ours and not getattr(error, _OF_STUDENT, False)


def _text_of(error: BaseException) -> str:
    """The message of an exception of ours; what the student put into it is not formatted."""
    return " ".join(arg for arg in error.args if type(arg) is str)


def _line_of(error: BaseException, source: str) -> str:
    """The line of the tests in which it happened."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TESTS:
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else source
