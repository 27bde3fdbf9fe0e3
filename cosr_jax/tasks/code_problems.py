"""From a reference program and what to call it with to a code problem with hidden tests."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from cosr_jax.tasks.problems import Problem
from cosr_jax.tasks.splits import Dice
from cosr_jax.types import CodeChecks

#: Names say nothing about what a function does, so that the question is in the words alone.
_FUNCTIONS = ("f", "g", "solve", "compute", "apply", "transform", "process", "run", "convert")
_WORDINGS = (
    "Write a Python function `{signature}` that {does}.",
    "Define a Python function `{signature}` which {does}.",
    "Write a function `{signature}` in Python. It {does}.",
    "Implement the Python function `{signature}`: it {does}.",
)

_OPEN, _CLOSE = "```python\n", "\n```"


class Exercise(NamedTuple):
    """What one function has to do; "@" stands for the name of its first argument."""

    does: str  # a clause that begins with a verb, e.g. "returns @ plus 7"
    names: Sequence[str]  # for the first argument, one of which is taken
    body: str  # of the reference, not indented; it is the problem's content
    inputs: Sequence[tuple[Any, ...]]  # arguments of the tests' calls; plain data
    others: str = ""  # further arguments, e.g. ", y"
    changes: bool = False  # the first argument is changed, and nothing returned


def function_problem(exercise: Exercise, dice: Dice, *, with_example: bool = False) -> Problem:
    """A problem that asks for one function; its tests compare calls with the reference's results.

    Args:
      exercise: the function.
      dice: picks names and wording.
      with_example: show the first call with its result, where words may leave a doubt.
    """
    function, argument = dice.choice(_FUNCTIONS), dice.choice(exercise.names)
    signature = f"{function}({argument}{exercise.others})"
    body = exercise.body.replace("@", argument)
    source = f"def {signature}:\n{textwrap.indent(body, '    ')}"
    calls = [_call(function, arguments, exercise.changes) for arguments in exercise.inputs]
    probes = list(dict.fromkeys(calls))
    does = exercise.does.replace("@", argument)
    ask = dice.choice(_WORDINGS).format(signature=signature, does=does)
    if with_example:
        shown, result = exercise.inputs[0], _run(source, *probes[0])
        if exercise.changes:
            ask += f" For example, `{shown[0]!r}` becomes `{result!r}`."
        else:
            call = f"{function}({', '.join(map(repr, shown))})"
            ask += f" For example, `{call}` returns `{result!r}`."
    content = " ".join(exercise.body.split())
    return code_problem(content, ask, source, function, probes)


def code_problem(
    content: str, ask: str, source: str, entry_point: str, probes: Sequence[tuple[str, str]]
) -> Problem:
    """A problem whose tests are made by running its reference.

    Args:
      content: see Problem.content.
      ask: the question.
      source: the reference program.
      entry_point: what the tests use of it.
      probes: (statements, expression): after the statements the expression must have the value that
        it has with the reference.
    """
    tests = tuple(
        f"{setup}\nassert {expression} == {_run(source, setup, expression)!r}".lstrip()
        for setup, expression in probes
    )
    return Problem(content, ask, fenced(source), checks=CodeChecks(entry_point, tests))


def fenced(source: str) -> str:
    """``source`` as the code block that an answer is."""
    return f"{_OPEN}{source}{_CLOSE}"


def unfenced(solution: str) -> str:
    """The source that ``fenced`` made ``solution`` of.

    Raises:
      ValueError: the text is no such block.
    """
    source = solution.removeprefix(_OPEN).removesuffix(_CLOSE)
    if fenced(source) != solution:
        raise ValueError(f"{solution!r} is no Python code block")
    return source


def _call(function: str, arguments: tuple[Any, ...], changes: bool) -> tuple[str, str]:
    if not changes:
        return "", f"{function}({', '.join(map(repr, arguments))})"
    others = "".join(f", {argument!r}" for argument in arguments[1:])
    return f"data = {arguments[0]!r}\n{function}(data{others})", "data"


def _run(source: str, setup: str, expression: str) -> Any:
    """The value of an expression over a program that this package wrote itself."""
    names: dict[str, Any] = {}
    exec(f"{source}\n{setup}", names)
    return eval(expression, names)
