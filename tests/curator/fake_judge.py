"""A judge for tests alone: runs trusted programs in this process and compares rationals."""

import contextlib
import io
import sys
import types
from fractions import Fraction

from cosr_jax.types import Outcome, Verdict


def judge(cases):
    """``protocols.Verifier.judge`` for tasks that the tests themselves wrote."""
    return [_judge(task, completion.text) for task, completion in cases]


def _judge(task, text):
    passes = _maths(task, text) if task.domain == "math" else _code(task, text)
    return Verdict(Outcome.PASS if passes else Outcome.FAIL, float(passes))


def _maths(task, text):
    value = text.removeprefix("\\boxed{").removesuffix("}")
    values = []
    for answer in (value, task.answer):
        try:
            fraction = answer.replace("\\frac{", "").replace("}{", "/").replace("}", "")
            values.append(Fraction(fraction.replace(",", "")))
        except ValueError:
            values.append(answer.strip())
    return values[0] == values[1]


def _code(task, text):
    code = text.removeprefix("```python\n").removesuffix("```")
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, module.__dict__)
            names = {n: v for n, v in vars(module).items() if not n.startswith("_")}
            for test in task.checks.tests:
                exec(test, names)
    except BaseException:
        return False
    finally:
        del sys.modules["solution"]
    return True
