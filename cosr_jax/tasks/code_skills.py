"""The suite's Python skills: small functions and classes, with hidden tests and short references.

Constants, names and wordings vary; levels of one skill never share a question.  Up to level 3 a
function's worked answer takes about 60 tokens at most, so that a small student can learn to write
it.  From level 4 on the question shows one of the tests, as words grow long there.
"""

from __future__ import annotations

from collections.abc import Callable

from cosr_jax.tasks import code_functions as functions
from cosr_jax.tasks.code_classes import classes
from cosr_jax.tasks.code_problems import Exercise, function_problem
from cosr_jax.tasks.problems import Course, Generator, Problem
from cosr_jax.tasks.splits import Dice


def _function(exercise: Callable[[int, Dice], Exercise]) -> Generator:
    def problem(level: int, dice: Dice) -> Problem:
        return function_problem(exercise(level, dice), dice, with_example=level >= 4)

    return problem


CODE = Course(
    "code",
    "Answer with a Python code block.",
    {
        "py_formulas": _function(functions.formulas),
        "py_conditions": _function(functions.conditions),
        "py_aggregates": _function(functions.aggregates),
        "py_mappings": _function(functions.mappings),
        "py_filters": _function(functions.filters),
        "py_strings": _function(functions.strings),
        "py_loops": _function(functions.loops),
        "py_dictionaries": _function(functions.dictionaries),
        "py_changes": _function(functions.changes),
        "py_classes": classes,
    },
)
