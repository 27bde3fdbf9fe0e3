"""Equality of two expressions, proved with sympy.  Imported by worker processes only.

No parser of sympy is ever called: ``expression`` reads the text, and its tree is built here call
by call.  A difference must be zero exactly: sampling at high precision can only refute equality,
never establish it (Math-Verify rounds, so that it takes 1/2^99 for 1/2^98; its issue 14).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.evalf import PrecisionExhausted

from cosr_jax.verifiers import cost, expression
from cosr_jax.verifiers.expression import Node, Unreadable

__all__ = ["Unreadable", "parse", "symbolically_equal"]

_DIGITS = 200
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}
_UNKNOWN_BASE = sympy.Symbol("logarithm of the base", positive=True)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: getattr(sympy, name) for name in ("sinh", "cosh", "tanh", "exp", "factorial", "sqrt")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan", "cot")},
    "ln": sympy.log,
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "binomial": sympy.binomial,
    "neg": lambda a: -a,
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": lambda a, b: a**b,
}


def symbolically_equal(given: str, gold: str) -> bool:
    """Whether two expressions, equations or inequalities are proved to say the same.

    Equations do if their differences of both sides are proportional, inequalities if they are by a
    positive number.  A ``given`` that cannot be read equals nothing; neither does one whose
    equality cannot be shown.

    Raises:
      Unreadable: ``gold`` cannot be read.
    """
    wanted = _Relation(gold)
    try:
        got = _Relation(given)
    except Unreadable:
        return False
    if wanted.operator != got.operator:
        return False
    if not wanted.operator:
        return _are_equal(got.difference, wanted.difference)
    return _are_proportional(got.difference, wanted.difference, wanted.operator in ("<", "<="))


class _Relation:
    """``difference operator 0``; the operator is "" for a mere expression."""

    def __init__(self, text: str):
        sides, operators = expression.split_relations(text)
        if len(sides) > 2:
            raise Unreadable(text)
        values = [parse(side) for side in sides]
        self.operator = operators[0] if operators else ""
        if self.operator in (">", ">="):
            self.operator = self.operator.replace(">", "<")
            values.reverse()
        self.difference = values[0] - values[1] if operators else values[0]


def parse(text: str) -> sympy.Expr:
    """A sympy expression from LaTeX or plain notation.

    Raises:
      Unreadable: it is none, too expensive to evaluate, or undefined such as 1/0.
    """
    tree = expression.parse(text)
    if reason := cost.refusal(tree):
        raise Unreadable(f"{text!r}: {reason}")
    value = _build(tree)
    if value.has(sympy.nan, sympy.zoo):
        raise Unreadable(f"{text!r} is undefined")
    return value


def _build(node: Node) -> Any:
    if node.op == "number":
        return sympy.Rational(node.value)
    if node.op == "constant":
        return _CONSTANTS[str(node.value)]
    if node.op == "variable":
        # As in school: only z and w may be complex.
        return sympy.Symbol(str(node.value), real=None if node.value in ("z", "w") else True)
    arguments = [_build(argument) for argument in node.args]
    if node.op == "root":
        return _root(*arguments)
    if node.op == "log":
        base = sympy.log(arguments[1]) if len(arguments) == 2 else _UNKNOWN_BASE
        return sympy.log(arguments[0]) / base
    return _FUNCTIONS[node.op](*arguments)


def _root(radicand: Any, index: Any) -> Any:
    """The real root of a negative number where there is one."""
    if radicand.is_negative and index.is_Integer and index % 2:
        return -sympy.root(-radicand, index)
    return sympy.root(radicand, index)


def _are_equal(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if a.has(sympy.oo) or b.has(sympy.oo):
        return False
    if a.free_symbols != b.free_symbols and not (a - b).has(sympy.Symbol):
        return False
    return _is_zero(a - b)


def _are_proportional(a: Any, b: Any, only_positive: bool) -> bool:
    if a.free_symbols != b.free_symbols or not b.free_symbols or a.has(sympy.oo):
        return False
    factor = sympy.simplify(a / b)
    if not factor.is_number or factor.is_zero is not False:
        return False
    return not only_positive or factor.is_positive is True


def _is_zero(difference: sympy.Expr) -> bool:
    if difference.is_Rational:
        return bool(difference == 0)
    if _differs_somewhere(difference):
        return False
    for simplify in (sympy.expand, sympy.radsimp, sympy.expand_complex, sympy.simplify):
        if simplify(difference) == 0:
            return True
    return difference.equals(0) is True


def _differs_somewhere(difference: sympy.Expr) -> bool:
    """Whether the value at some fixed rational point is provably not zero."""
    symbols = sorted(difference.free_symbols, key=str)
    for shift in range(3):
        point = {s: sympy.Rational(7 + 3 * i + shift, 5 + 2 * shift) for i, s in enumerate(symbols)}
        value = difference.subs(point)
        if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
            continue
        if value.is_Rational:
            if value != 0:
                return True
            continue
        # Strict evaluation raises unless two digits are certain; a true zero has none.
        with contextlib.suppress(PrecisionExhausted):
            if value.evalf(2, maxn=_DIGITS, strict=True) != 0:
                return True
    return False
