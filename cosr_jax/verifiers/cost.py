"""How expensive an expression may be before it is shown to an evaluator.

Towers of powers, large exponents, factorials and binomials, and products of many sums are bounded
by what their value would take, without computing it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from cosr_jax.verifiers.expression import Node, Unreadable, parse, rational

_MAX_DIGITS = 3000  # of any number that evaluation can meet
_MAX_TERMS = 2000  # of a product of sums, written out
_MAX_ARGUMENT = 1000  # of a factorial or binomial


def refusal(node: Node) -> str:
    """Why ``node`` is too expensive to evaluate; "" if it is not."""
    try:
        size = _size(node)
    except _TooLargeError as error:
        return str(error)
    return "" if size.terms <= _MAX_TERMS else f"a product of more than {_MAX_TERMS} terms"


def evaluated(text: str) -> str:
    """``text`` as a fraction if it is rational arithmetic, defined and not too expensive."""
    try:
        tree = parse(text)
        value = None if refusal(tree) else rational(tree)
    except Unreadable:
        return text
    return text if value is None else str(value)


class _TooLargeError(Exception):
    pass


class _Size(NamedTuple):
    """Bounds: decimal digits of numbers, terms when multiplied out, and log10 of the magnitude."""

    digits: float
    terms: float
    magnitude: float | None  # None with variables


def _size(node: Node) -> _Size:
    if node.op == "number":
        assert isinstance(node.value, Fraction)
        top, bottom = (max(1, abs(n)) for n in node.value.as_integer_ratio())
        digits = (top.bit_length() + bottom.bit_length()) * 0.302
        return _Size(digits, 1, math.log10(top) if top < 10**15 else digits)
    if node.op == "constant":
        return _Size(1, 1, 0.0 if node.value == "i" else 0.5)
    if node.op == "variable":
        return _Size(1, 1, None)
    if node.op == "^":
        return _power_size(node)
    if node.op in ("factorial", "binomial"):
        return _combinatorial_size(node)
    sizes = [_size(argument) for argument in node.args]
    known = [size.magnitude for size in sizes if size.magnitude is not None]
    magnitude = sum(known) if len(known) == len(sizes) else None
    digits = sum(size.digits for size in sizes) + 1
    terms = math.prod(size.terms for size in sizes)
    if node.op == "+":
        terms = sum(size.terms for size in sizes)
        magnitude = None if magnitude is None else max(known) + 0.31  # log10 of 2
    if node.op == "/" and magnitude is not None:
        magnitude = known[0] + sizes[1].digits  # the divisor may be as small as that
    if node.op in ("exp", "sinh", "cosh"):
        magnitude = None if magnitude is None else _exponent_bound(magnitude)
        terms = 1
    return _checked(digits, terms, magnitude)


def _power_size(node: Node) -> _Size:
    base, exponent = map(_size, node.args)
    if exponent.magnitude is None:
        return _checked(base.digits + exponent.digits, base.terms * exponent.terms, None)
    times = _exponent_bound(exponent.magnitude)
    whole = rational(node.args[1]) if exponent.digits < 9 else None
    if whole is not None:
        times = max(1.0, abs(float(whole)))
    if whole is None or whole.denominator > 1:
        # Roots and irrational powers stay as they are, but their arguments must be computable.
        return _checked(
            base.digits * min(times, 3.0),
            base.terms,
            None if base.magnitude is None else (base.magnitude + 1) * times,
        )
    terms = base.terms
    if terms > 1:
        terms = math.comb(int(min(times, 9999)) + int(terms) - 1, int(terms) - 1)
    magnitude = None if base.magnitude is None else (base.magnitude + 1) * times
    return _checked(base.digits * times, terms, magnitude)


def _combinatorial_size(node: Node) -> _Size:
    sizes = [_size(argument) for argument in node.args]
    if any(size.magnitude is None for size in sizes):
        return _checked(sum(size.digits for size in sizes), 1, None)
    values = [rational(argument) for argument in node.args]
    if any(value is None or abs(value) > _MAX_ARGUMENT for value in values):
        raise _TooLargeError(f"a {node.op} of more than {_MAX_ARGUMENT}")
    largest = max(2.0, *(float(value or 0) for value in values))
    return _checked(largest * math.log10(largest), 1, largest * math.log10(largest))


def _exponent_bound(magnitude: float) -> float:
    if magnitude > 4:
        raise _TooLargeError("an exponent of more than 10^4")
    return 10.0**magnitude


def _checked(digits: float, terms: float, magnitude: float | None) -> _Size:
    if digits > _MAX_DIGITS or (magnitude is not None and magnitude > _MAX_DIGITS):
        raise _TooLargeError(f"a number of more than {_MAX_DIGITS} digits")
    if terms > 10**12:
        raise _TooLargeError("a product of too many terms")
    return _Size(digits, terms, magnitude)
