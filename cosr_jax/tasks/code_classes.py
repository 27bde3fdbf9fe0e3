"""The suite's skill of writing small Python classes."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from cosr_jax.tasks.code_problems import code_problem
from cosr_jax.tasks.problems import Problem
from cosr_jax.tasks.splits import Dice


class Subject(NamedTuple):
    """What one class has to do."""

    does: str  # what follows "Write a class `Name`"
    body: str
    probes: tuple[tuple[str, str], ...]  # (statements after ``thing = Name()``, expression)


def _counter(a: int, b: int) -> Subject:
    return Subject(
        f"whose attribute `value` starts at {a} and whose method `step()` adds {b} to it.",
        f"def __init__(self):\n    self.value = {a}\n\ndef step(self):\n    self.value += {b}",
        (
            ("", "thing.value"),
            ("thing.step()", "thing.value"),
            ("thing.step()\n" * 3, "thing.value"),
        ),
    )


def _capped(a: int, b: int) -> Subject:
    most = a + b
    return Subject(
        f"whose attribute `total` starts at {a} and whose method `add(amount)` adds to it, but "
        f"never beyond {most}.",
        f"def __init__(self):\n    self.total = {a}\n\n"
        f"def add(self, amount):\n    self.total = min(self.total + amount, {most})",
        (
            ("", "thing.total"),
            ("thing.add(1)", "thing.total"),
            (f"thing.add({b})", "thing.total"),
            (f"thing.add({b + 1})", "thing.total"),
            (f"thing.add({b + 9})\nthing.add(-2)", "thing.total"),
        ),
    )


def _stack(a: int, b: int) -> Subject:
    fill = f"for n in range({b} - 1):\n    thing.push(n)"
    return Subject(
        f"for a stack of at most {b} items. Its method `push(item)` does nothing when it is full; "
        f"`pop()` removes and returns the latest item, or returns {a} when there is none.",
        "def __init__(self):\n    self.items = []\n\n"
        f"def push(self, item):\n    if len(self.items) < {b}:\n        self.items.append(item)\n\n"
        f"def pop(self):\n    return self.items.pop() if self.items else {a}",
        (
            ("", "thing.pop()"),
            ("thing.push(-1)\nthing.push(-2)", "[thing.pop(), thing.pop(), thing.pop()]"),
            (f"{fill}\nthing.push(-1)\nthing.push(-2)", "[thing.pop(), thing.pop()]"),
        ),
    )


def _linear(a: int, b: int) -> Subject:
    return Subject(
        f"whose instances can be called: `Name()(x)` is x plus {a}. Its method `then(other)` "
        f"returns a function that calls the instance first, then `other`, and adds {b} to the "
        "result.",
        f"def __call__(self, x):\n    return x + {a}\n\n"
        f"def then(self, other):\n    return lambda x: other(self(x)) + {b}",
        (
            ("", "thing(0)"),
            ("", "thing(-3)"),
            ("", "thing.then(lambda x: x * 10)(2)"),
            ("", "thing.then(thing)(1)"),
            ("", "thing.then(thing.then(abs))(-99)"),
        ),
    )


def _nearest(a: int, b: int) -> Subject:
    return Subject(
        f"that holds numbers, {a} alone at first. Its method `put(number)` adds one, `take()` "
        f"removes and returns the number nearest to {b} (of equally near ones the smallest), or "
        "returns None when there is none, and `len()` of an instance is how many it holds.",
        f"def __init__(self):\n    self.numbers = [{a}]\n\n"
        "def put(self, number):\n    self.numbers.append(number)\n\n"
        "def take(self):\n    if not self.numbers:\n        return None\n"
        f"    best = min(self.numbers, key=lambda n: (abs(n - {b}), n))\n"
        "    self.numbers.remove(best)\n    return best\n\n"
        "def __len__(self):\n    return len(self.numbers)",
        (
            ("", "[len(thing), thing.take(), thing.take(), len(thing)]"),
            (f"thing.put({b})", "[thing.take(), thing.take()]"),
            (
                f"for n in ({b + 2}, {b - 2}, {b + 1}, {b + 1}):\n    thing.put(n)",
                "[len(thing), *(thing.take() for _ in range(6)), len(thing)]",
            ),
        ),
    )


def classes(level: int, dice: Dice) -> Problem:
    """A counter; a capped total; a stack with a capacity; functions that chain; a queue."""
    name = dice.choice(("Thing", "Box", "Item", "Model", "Unit"))
    a, b = dice.between(0, 40), dice.between(2, 40)
    does, body, probes = (_counter, _capped, _stack, _linear, _nearest)[level - 1](a, b)
    return code_problem(
        f"{level} {a} {b}",
        f"{dice.choice(('Write', 'Define'))} a Python class `{name}` {does.replace('Name', name)}",
        f"class {name}:\n{textwrap.indent(body, '    ')}",
        name,
        [(f"thing = {name}()\n{setup}".rstrip(), probe) for setup, probe in probes],
    )
