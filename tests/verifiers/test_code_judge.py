"""The judge of programs: categories, credit, whose fault a failure is, and what tests may do."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from sandbox_fixtures import descendants

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CodeChecks, Completion, Outcome, Task, UserError
from cosr_jax.verifiers.code import CodeJudge
from cosr_jax.verifiers.judges import Limits


class Bench:
    """A judge with an event loop of its own."""

    def __init__(self, **config):
        self.runner = asyncio.Runner()
        self.judge = CodeJudge(VerifierConfig(**config))
        try:
            self.runner.run(self.judge.start())
        except UserError as error:
            self.runner.close()
            pytest.skip(str(error))

    def __call__(self, code, tests=(), entry_point="f", io=(), text=None, **limits):
        return self.runner.run(self.verdict(code, tests, entry_point, io, text, **limits))

    async def verdict(self, code, tests=(), entry_point="f", io=(), text=None, **limits):
        tests = (tests,) if isinstance(tests, str) else tuple(tests)
        checks = CodeChecks("" if io else entry_point, tests, tuple(io))
        task = Task("code", "s", 0.5, "", "", "key", checks=checks)
        text = f"```python\n{code}\n```\n" if text is None else text
        limits = Limits(**{"wall_s": 120.0, **limits})
        return await self.judge.judge(task, Completion((), (), text, "stop"), limits)

    def close(self):
        self.runner.run(self.judge.close())
        self.runner.close()


@pytest.fixture(scope="module")
def bench():
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def generous():
    bench = Bench(partial_credit=True)
    yield bench
    bench.close()


SQUARE = "def f(x): return x * x"


def test_a_pass_has_full_reward_and_names_what_was_judged(bench):
    verdict = bench(SQUARE, "assert f(3) == 9")
    assert verdict.outcome is Outcome.PASS and verdict.reward == 1.0 and verdict.category == ""
    assert verdict.value_correct and verdict.method and verdict.answer.strip() == SQUARE
    assert 0 < verdict.seconds < 120


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("def f(x): return 8", "wrong_answer"),
        ("def f(x): return None", "wrong_answer"),
        ("def f(x): raise ValueError(x)", "runtime_error"),
        ("def f(x): assert False", "runtime_error"),
        ("1 / 0\ndef f(x): return 9", "runtime_error"),
        ("def f(x): import sys; sys.exit(0)", "runtime_error"),
        ("import os; os._exit(0)", "crash"),
        ("def f(x):\n    import ctypes; ctypes.string_at(0)", "crash"),
        ("def f(x) return 9", "syntax_error"),
        ("def f(x):\n\treturn 9\n        pass", "syntax_error"),
        ("import no_such_module\ndef f(x): return 9", "missing_import"),
        ("def f(x):\n    from math import no_such_name", "missing_import"),
        ("def g(x): return 9", "missing_entry_point"),
        ("def f(x):\n    import os; os.fork()", "forbidden"),
        ("def f(x):\n    import socket; socket.socket()", "forbidden"),
        ("def f(x): return bytearray(1 << 40)", "memory_limit"),
        ("def f(x):\n    while True: print(x)", "output_limit"),
        ("def f(x): return '*' * (100 << 20)", "output_limit"),
        ("def f(x):\n    open('big', 'wb').write(bytes(40 << 20))", "output_limit"),
    ],
)
def test_each_failure_has_its_category(bench, code, category):
    verdict = bench(code, "assert f(3) == 9")
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, category), verdict.detail
    assert verdict.reward == 0.0 and not verdict.value_correct and len(verdict.detail) <= 300


def test_running_out_of_time_is_a_failure_in_time(bench):
    verdict = bench("def f(x):\n    while True: pass", "assert f(3) == 9", wall_s=0.5)
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, "timeout")
    assert 0.5 <= verdict.seconds < 60


def test_text_without_code_and_broken_text_fail(bench):
    assert bench("", "assert f(3) == 9", text="No idea.").category == "no_code"
    assert bench(SQUARE + "\ns = '\ud800'", "assert f(3) == 9").outcome is Outcome.FAIL
    assert bench(SQUARE + "\n\0", "assert f(3) == 9").outcome is Outcome.FAIL


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(3) = 9",
        "import no_such_module\nassert f(3) == 9",
        "assert True",
        "import os\nf(3)\nos._exit(0)",
    ],
)
def test_tests_that_cannot_judge_are_no_failure_of_the_program(bench, tests):
    verdict = bench(SQUARE, tests)
    assert verdict.outcome is Outcome.ERROR and verdict.detail


def test_a_name_that_tests_need_and_the_program_lacks_is_the_programs_failure(bench):
    assert bench(SQUARE, "assert helper(3) == 9").category == "missing_entry_point"
    tests = "from solution import helper\nassert helper(f(3)) == 9"
    assert bench(SQUARE, tests).category == "missing_entry_point"


TESTS = ("import math", "assert f(1) == 1", "assert f(2) == 4", "assert f(-1) == 1")


@pytest.mark.parametrize(
    ("code", "reward"),
    [
        ("def f(x): return x * x", 1.0),
        ("def f(x): return x * abs(x)", 2 / 3),
        ("def f(x): return x", 1 / 3),
        ("def f(x): return 0", 0.0),
        ("def f(x):\n    if x < 0: raise SystemExit\n    return x * x", 2 / 3),
        ("import os\ndef f(x):\n    if x < 0: os._exit(0)\n    return x * x", 2 / 3),
        ("import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x * x", 1 / 3),
        ("def f(x):\n    while x < 0: pass\n    return x * x", 0.5),
        ("def g(x): return x * x", 0.0),
    ],
)
def test_partial_credit_is_the_share_of_tests_that_use_the_program(generous, code, reward):
    verdict = generous(code, TESTS, wall_s=2.0 if "while" in code else 120.0)
    assert verdict.reward == pytest.approx(reward)
    assert (verdict.outcome is Outcome.PASS) == (reward == 1.0)


def test_partial_credit_of_scripts(generous, bench):
    io = [("1", "1"), ("2", "4"), ("3", "3"), ("4", "4")]
    verdict = generous("print(input())", io=io)
    assert verdict.outcome is Outcome.FAIL and verdict.reward == 0.75
    assert bench("print(input())", io=io).reward == 0.0


def test_a_hung_up_program_fails_whatever_the_tests_catch(bench):
    tests = "try:\n    f(1)\nexcept BaseException:\n    pass\nf\n"
    code = "import os\ndef f(x): os._exit(0)"
    assert bench(code, tests).category == "crash"
    assert bench("def f(x): raise SystemExit", tests).outcome is Outcome.PASS


def test_scripts_compare_lines_without_trailing_blanks(bench):
    def passes(code, stdout):
        return bench(code, io=[("", stdout)]).outcome is Outcome.PASS

    assert passes("print('a  ')\nprint()", "a")
    assert passes("print('a')\nprint('b')", "a\r\nb\r\n")
    assert not passes("print(' a')", "a")
    assert not passes("print('a')\nprint()\nprint('b')", "a\nb")
    assert not passes("print('a')\nraise SystemExit(2)", "a")
    assert passes("import sys\nprint('a', file=sys.stderr)\nprint('b')\nexit(0)", "b")
    assert passes("import sys\nassert __name__ == '__main__' and sys.stdin.read() == ''", "")


def test_large_input_and_output_of_scripts(bench):
    stdin = "x" * (3 << 20)
    assert bench("print(len(input()))", io=[(stdin, str(3 << 20))]).outcome is Outcome.PASS
    code = "print('y' * 60000)"
    assert bench(code, io=[("", "y" * 60000)]).outcome is Outcome.PASS
    assert bench(code, io=[("", "y" * 60000)], output_kb=8).category == "output_limit"


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("print(", "syntax_error"),
        ("import no_such_module", "missing_import"),
        ("[][1]", "runtime_error"),
        ("raise SystemExit('bye')", "runtime_error"),
        ("import os; os.abort()", "crash"),
        ("import os; os.fork()", "forbidden"),
        ("x = [0] * 10 ** 11", "memory_limit"),
        ("while True: print('x' * 100)", "output_limit"),
        ("while True: pass", "timeout"),
        ("print(7)", "wrong_answer"),
    ],
)
def test_categories_of_scripts(bench, code, category):
    verdict = bench(code, io=[("", "9")], wall_s=1.0 if category == "timeout" else 120.0)
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, category), verdict.detail


def test_scripts_start_afresh_for_each_input(bench):
    code = "import os\nprint(os.path.exists('mark'))\nopen('mark', 'w').close()"
    assert bench(code, io=[("", "False"), ("", "False")]).outcome is Outcome.PASS


def test_the_same_case_has_the_same_verdict_every_time(bench):
    code = "import random\ndef f(x): return random.random(), hash('abc'), {'a', 'b', 'c'}"
    tests = "r = f(1)\nassert str(r) == repr(r)\nraise ValueError(str(r))"

    async def many():
        return await asyncio.gather(*(bench.verdict(code, tests) for _ in range(24)))

    details = {verdict.detail for verdict in bench.runner.run(many())}
    assert len(details) == 1


def python_below(pid):
    """The first process at or below that one that is not bubblewrap."""
    if Path(f"/proc/{pid}/comm").read_text().strip() != "bwrap":
        return pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return python_below(int(child))


def test_a_killed_server_is_an_error_and_the_next_case_has_another_server():
    bench = Bench(workers=1)
    try:
        assert bench(SQUARE, "assert f(3) == 9").outcome is Outcome.PASS
        server = python_below(bench.judge._servers[-1][0]._sandbox._server._process.pid)

        async def kill_amid():
            code = "import time\ntime.sleep(99)\n" + SQUARE
            idle = descendants(server)
            case = asyncio.ensure_future(bench.verdict(code, "assert f(3) == 9"))
            while not descendants(server) - idle:
                await asyncio.sleep(0.01)
            os.kill(server, signal.SIGKILL)
            return await case

        assert bench.runner.run(kill_amid()).outcome is Outcome.ERROR
        assert bench(SQUARE, "assert f(3) == 9").outcome is Outcome.PASS
    finally:
        bench.close()


def test_a_cancelled_case_leaves_the_judge_in_order(bench):
    async def cancel():
        case = asyncio.ensure_future(
            bench.verdict("def f(x):\n    while True: pass", "assert f(3) == 9")
        )
        await asyncio.sleep(0.2)
        case.cancel()
        with pytest.raises(asyncio.CancelledError):
            await case

    bench.runner.run(cancel())
    assert bench(SQUARE, "assert f(3) == 9").outcome is Outcome.PASS


@pytest.mark.parametrize(
    "name", ["__globals__", "__code__.co_consts", "__closure__", "__builtins__"]
)
def test_the_program_cannot_look_into_functions_of_the_tests(bench, name):
    code = f"def f(g):\n    try:\n        g.{name}\n    except AttributeError:\n        return 9"
    assert bench(code, "assert f(lambda: 1) == 9").outcome is Outcome.PASS


def test_details_name_the_failing_line_and_the_programs_message(bench):
    verdict = bench(SQUARE, "x = 1\nassert f(3) == 10\n")
    assert "assert f(3) == 10" in verdict.detail
    verdict = bench("def f(x): raise ValueError('too\\nlarge')", "f(3)")
    assert verdict.detail == "ValueError: too large"


def test_memory_and_files_of_a_case_are_its_own(bench):
    code = (
        "import os\ndef f(x):\n    open('note', 'w').write('x')\n    return sorted(os.listdir('.'))"
    )
    for _ in range(2):
        assert bench(code, "assert f(1) == ['note']").outcome is Outcome.PASS


@pytest.mark.slow  # JAX takes seconds to import
@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (
            "import jax, jax.numpy as jnp\n@jax.jit\ndef f(x): return jnp.asarray(x) * 2.0",
            "import numpy as np\nr = f(np.array([1.0, 2.0], np.float32))\n"
            "np.testing.assert_allclose(r, [2.0, 4.0], rtol=1e-6)\n"
            "assert r.dtype == np.float32 and r.shape == (2,)",
        ),
        (
            "import jax, jax.numpy as jnp\ndef f(x): return jax.grad(lambda v: jnp.sum(v ** 2))(x)",
            "import jax.numpy as jnp\nr = f(jnp.array([1.0, 2.0]))\n"
            "assert jnp.allclose(r, jnp.array([2.0, 4.0])) and isinstance(r, jnp.ndarray)",
        ),
        (
            "import jax.numpy as jnp\ndef f(x): return jnp.asarray(x, jnp.bfloat16)",
            "import numpy as np\nr = f([1.5])\nassert str(r.dtype) == 'bfloat16' and r[0] == 1.5",
        ),
    ],
)
def test_arrays_of_jax(bench, code, tests):
    verdict = bench(code, tests, wall_s=60.0)
    assert verdict.outcome is Outcome.PASS, verdict.detail
