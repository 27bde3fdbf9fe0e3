"""Answers that are wrong by construction: a task that accepts one of them checks nothing."""

from __future__ import annotations

import ast
import re

from cosr_jax.tasks.code_problems import fenced
from cosr_jax.types import CodeChecks, Task

_INTEGER = re.compile(r"\d+")
_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)

#: Changes any value into another one of its kind.
_CHANGE = """
def _changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return type(value)((*value, None))
    if isinstance(value, (set, frozenset)):
        return type(value)((*value, "x"))
    if isinstance(value, dict):
        return {**value, "x": None}
    return 0 if value is None else None

"""


def idle_answers(task: Task) -> tuple[str, ...]:
    """Answers that do nothing: an empty function, nothing at all."""
    if not isinstance(task.checks, CodeChecks):
        return ()
    name = _entry_name(task.checks)
    return (fenced(f"def {name}(*args, **kwargs):\n    pass" if name else "pass"),)


def perturbed_answers(task: Task) -> tuple[str, ...]:
    """The right answer made wrong: another number; a function that changes what it returns.

    Functions that return nothing, generators, classes and scripts have no such answer.
    """
    if task.domain == "math":
        return (f"\\boxed{{{_other(task.answer)}}}",)
    if not isinstance(task.checks, CodeChecks) or not (name := _entry_name(task.checks)):
        return ()
    blocks = _FENCE.findall(task.solution)
    source = blocks[-1] if blocks else task.solution
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()  # it cannot pass its own tests, which refuses the task
    functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not functions or not _returns(functions[-1]):
        return ()
    wrapper = (
        f"_original = {name}\n\n"
        f"def {name}(*args, **kwargs):\n    return _changed(_original(*args, **kwargs))\n"
    )
    return (fenced(f"{source}\n{_CHANGE}\n{wrapper}"),)


def _entry_name(checks: CodeChecks) -> str:
    return re.findall(r"^\w*", checks.entry_point)[0]


def _other(answer: str) -> str:
    """Another value than ``answer``: its last integer is one more."""
    places = list(_INTEGER.finditer(answer))
    if not places:
        return f"{answer} + 1"
    last = places[-1]
    return f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"


def _returns(function: ast.FunctionDef) -> bool:
    """Whether calling it gives a value; not so of generators."""
    nodes = list(ast.walk(function))
    if any(isinstance(n, ast.Yield | ast.YieldFrom) for n in nodes):
        return False
    return any(isinstance(n, ast.Return) and n.value is not None for n in nodes)
