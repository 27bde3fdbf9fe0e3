"""Fuzzes what reads a student's text or bytes: no crash, no slow input, no execution.

    python tools/fuzz_verifiers.py TARGET [-max_total_time=600 and other libFuzzer arguments]

Needs atheris (pip install atheris; wheels exist for Python 3.11 to 3.13 on Linux).  Targets:

    answers    extraction.extract_answer
    code       code_extraction.extract_code
    maths      math_answer.answers_agree and restates, as the pool's own process calls them
    symbolic   symbolic.symbolically_equal on what is admitted, as a worker does
    wire       the decoder of what a student's process sends
    cases      the parser of ``cosr verify --stdio``

A finding is an exception, a broken promise of the function, more than ``LIMIT_S`` of CPU time, or
any audit event of executing code, opening files or starting processes.  Inputs worth keeping go to
tests/verifiers/corpus/fuzz/TARGET, which the tests replay.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parents[1] / "tests" / "verifiers" / "corpus" / "fuzz"

#: CPU seconds that one input may take outside of a worker; honest ones take milliseconds.
LIMIT_S = 1.0
#: A worker is killed after seconds; so long may sympy work on an input here.
_SYMPY_S = 2

_FORBIDDEN_EVENTS = (
    *("exec", "import", "open", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("subprocess.Popen", "socket.connect", "ctypes.dlopen", "pickle.find_class"),
)
_is_watching = False


class ForbiddenError(Exception):
    """Text of a student made this process execute or open something."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_watching and event in _FORBIDDEN_EVENTS:
        raise ForbiddenError(f"{event}: {arguments!r:.200}")


@contextlib.contextmanager
def watched(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Raises if what is inside executes or opens anything, or takes longer than ``limit_s``."""
    global _is_watching
    gc.disable()  # whatever ran before in this process may have left much to collect
    start = time.thread_time()
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False
        spent = time.thread_time() - start
        gc.enable()
    if spent > limit_s:
        raise TimeoutError(f"{spent:.2f} s of CPU time")


def _two(data: bytes) -> tuple[str, str]:
    first, _, second = data.decode("utf-8", "surrogateescape").partition("\0")
    return first, second


def answers(data: bytes) -> None:
    """What is found is a stretch of the text."""
    from cosr_jax.verifiers.extraction import METHODS, extract_answer, final_text

    text = data.decode("utf-8", "surrogateescape")
    for finish_reason in ("stop", "length"):
        with watched():
            found = extract_answer(text, finish_reason)
        if found.category:
            assert not found.answer and not found.method
        else:
            assert found.method in METHODS
            assert found.answer and found.answer in final_text(text)


def code(data: bytes) -> None:
    """What is found is code and no category, or a category and no code."""
    from cosr_jax.verifiers.code_extraction import extract_code

    name, text = _two(data)
    for finish_reason in ("stop", "length"):
        for entry_point in (name, None):
            with watched():
                found = extract_code(text, entry_point, finish_reason)
            assert bool(found.code.strip()) == (found.category == "")


def maths(data: bytes) -> None:
    """Two texts are decided or left open; the same text never differs from itself."""
    from cosr_jax.verifiers.math_answer import answers_agree, restates

    given, gold = _two(data)
    with watched():
        assert answers_agree(given, gold) in (True, False, None)
        assert answers_agree(gold, given) in (True, False, None)
        restates(given, gold, given)


class _OutOfTimeError(BaseException):
    pass


def _out_of_time(*_: object) -> None:
    raise _OutOfTimeError


def symbolic(data: bytes) -> None:
    """What is admitted is decided within the limit of a worker; sympy may give up, not run code."""
    from cosr_jax.verifiers.expression import Unreadable
    from cosr_jax.verifiers.math_answer import symbolic_refusal
    from cosr_jax.verifiers.symbolic import symbolically_equal

    given, gold = _two(data)
    if symbolic_refusal(given) or symbolic_refusal(gold):
        return
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(_SYMPY_S)
    try:
        # A worker that runs out of memory says so, and the case has failed.
        with contextlib.suppress(Unreadable, _OutOfTimeError, MemoryError):
            assert symbolically_equal(given, gold) in (True, False)
    except ForbiddenError:
        raise
    except AssertionError:
        raise
    except Exception as error:  # sympy's own; a worker books it as "not shown"
        if not type(error).__module__.startswith(("sympy", "mpmath", "builtins")):
            raise
    finally:
        signal.alarm(0)


class _NoLink:
    """A conversation without twins, objects or modules."""

    is_strict = True
    peer_is_strict = True

    def read_twin(self, number: int) -> Any:
        return number

    def read_object(self, tag: int, reader: Any) -> Any:
        return tag


def wire(data: bytes) -> None:
    """A message is a value, or is refused with what ``Peer`` takes for a WireError."""
    from cosr_jax.verifiers.code_exec import values  # noqa: F401 - brings the kinds of values
    from cosr_jax.verifiers.code_exec.wire import Reader, WireError

    refusals = (WireError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    with contextlib.suppress(*refusals), watched():
        reader = Reader(data, _NoLink())  # type: ignore[arg-type]
        reader.value()
        reader.end()


def cases(data: bytes) -> None:
    """A line is a case or a BadCase."""
    from cosr_jax.verifiers.judges import Limits
    from cosr_jax.verifiers.wire import BadCase, parse_case, salvaged_id

    with watched():
        salvaged_id(data)
        with contextlib.suppress(BadCase):
            parse_case(data, Limits())


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (answers, code, maths, symbolic, wire, cases)
}

_TOKENS = (
    *("```", "```python", "~~~", "<think>", "</think>", "<answer>", "</answer>", "<|im_end|>"),
    *("<|channel|>final<|message|>", "<|end|>", "def f", "class f", "import f", "f = ", "input("),
    *(r"\\boxed{", r"\\frac{", r"\\sqrt[3]{", r"\\text{cm}", r"\\pm", r"\\cup", r"\\infty", r"\\{"),
    *(
        r"\\begin{pmatrix}",
        r"\\end{pmatrix}",
        r"\\\\",
        "answer is ",
        "#### ",
        r"\\log_2",
        "^{",
        "_2",
    ),
    *(r"\\overline{3}", "10^", r"\\times", "1,000", "%", "!", "3:45 pm", " or ", " and ", "x = "),
    *(
        '{\\"id\\":',
        '\\"type\\":',
        '\\"math\\"',
        '\\"code\\"',
        '\\"completion\\":',
        '\\"gold\\":',
        "1e9",
    ),
)


def _seeds(name: str) -> Iterator[bytes]:
    """Inputs to start from."""
    import datetime
    import decimal
    import fractions
    import json

    corpus = CORPUS.parent
    if name == "wire":
        from cosr_jax.verifiers.code_exec import values  # noqa: F401 - as in ``wire``
        from cosr_jax.verifiers.code_exec.wire import Writer

        for value in (
            *(0, 1 << 99, 0.5, 1j, "text", b"bytes", None, True, (1, ("a", 2.0)), range(3)),
            *(slice(1, 2), frozenset((1, 2)), fractions.Fraction(1, 3), decimal.Decimal("1.5")),
            datetime.datetime(2020, 1, 2),
        ):
            writer = Writer(_NoLink())  # type: ignore[arg-type]
            writer.value(value)
            yield bytes(writer.data)
        return
    if name == "cases":
        for case in (
            {"id": 1, "type": "math", "completion": "19", "gold": "19", "limits": {"wall_s": 1.5}},
            {"id": "a", "type": "code", "completion": "x", "entry_point": "f", "tests": ["f(1)"]},
            {"type": "code", "entry_point": None, "io": [{"stdin": "1", "stdout": "2"}]},
        ):
            yield json.dumps(case).encode()
        return
    for line in (corpus / "extraction_golden.jsonl").read_text().splitlines():
        case = json.loads(line)
        text = (
            f"{case.get('entry_point') or 'f'}\0{case['text']}" if name == "code" else case["text"]
        )
        yield text.encode("utf-8", "surrogateescape")
    for line in (corpus / "math_pairs.jsonl").read_text().splitlines():
        case = json.loads(line)
        yield f"{case['given']}\0{case['gold']}".encode("utf-8", "surrogateescape")


def main() -> None:
    """Runs libFuzzer on the target that the command line names, until it finds something."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(__doc__)
    import atheris

    name = sys.argv.pop(1)
    target = TARGETS[name]
    modules = ["code_exec.values", "code_extraction", "maths", "wire"]
    with atheris.instrument_imports(include=["cosr_jax.verifiers"]):
        for module in modules + ["symbolic"] * (name == "symbolic"):
            importlib.import_module(f"cosr_jax.verifiers.{module}")
    for module in ("pathlib", "unicodedata", "uuid", "numpy"):
        importlib.import_module(module)  # parsers and decoders do when they first need them
    target(b"x\0x")
    sys.addaudithook(_audit)
    with tempfile.TemporaryDirectory() as folder:
        seeds, tokens = Path(folder) / "seeds", Path(folder) / "tokens"
        seeds.mkdir()
        for i, seed in enumerate(_seeds(name)):
            (seeds / f"seed{i}").write_bytes(seed)
        tokens.write_text("\n".join(f'"{token}"' for token in _TOKENS))
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        arguments = [sys.argv[0], str(seeds), str(CORPUS / name), f"-dict={tokens}"]
        atheris.Setup([*arguments, "-max_len=4096", *sys.argv[1:]], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
