r"""Sets of reals: intervals, their unions, and inequalities in one variable.

``(1, 3]``, ``1 < x \le 3`` and ``x \in (1, 2] \cup (2, 3]`` are the same set.  Unions with rational
ends are merged; where an end needs algebra the pieces are compared one by one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from cosr_jax.verifiers.expression import split_relations
from cosr_jax.verifiers.notation import closes_at_end, split_items
from cosr_jax.verifiers.quantities import quantity

_MAX_PIECES = 20


class End(NamedTuple):
    """An end of an interval: as written, "-" and "+" for the infinities."""

    text: str
    is_closed: bool


class Interval(NamedTuple):
    """What lies between two ends."""

    low: End
    high: End


class RealSet(NamedTuple):
    """A union of intervals, and the variable that it is said of ("" for none)."""

    pieces: tuple[Interval, ...]
    variable: str


_NOWHERE, _EVERYWHERE = End("-", False), End("+", False)
_REALS = Interval(_NOWHERE, _EVERYWHERE)
_ALL = frozenset((r"\mathbb{R}", "all real numbers", "all reals"))
_MEMBER = re.compile(r"([A-Za-z]|\\theta) ?\\in(?![A-Za-z]) ?")
_BUILDER = re.compile(r"\\\{ ?(?:[A-Za-z])(?: ?\\in ?\\mathbb\{R\})? ?[|:](.*)\\\}")
_BOTH = re.compile(r"\band\b|\\(?:land|wedge)(?![A-Za-z])")
_VARIABLE = re.compile(r"[A-Za-z]|\\theta")
_CUP = re.compile(r"\\cup(?![A-Za-z])|(?<=[\])}]) ?U ?(?=[\[(\\])")
_WITHOUT = re.compile(r"\\(?:setminus|backslash)(?![A-Za-z])")
_OR = re.compile(r"\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])")
_INFINITE = re.compile(r"([-+]?) ?(?:\\infty|oo|inf|infinity)")
_MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def looks_like_set(text: str) -> bool:
    """Whether normalised ``text`` can only be meant as a set of reals, not as a pair of numbers."""
    return bool(
        re.search(
            r"[<>]|\\(?:cup|leq?|geq?|neq?|lt|gt|infty|setminus|backslash|in)(?![A-Za-z])", text
        )
        or _CUP.search(text)
        or _peeled(text) in _ALL
        or (
            text[:1] in "(["
            and text[-1:] in ")]"
            and (text[0], text[-1]) in (("(", "]"), ("[", ")"))
        )
    )


def real_set(text: str) -> RealSet | None:
    """The set that normalised ``text`` describes; None if it describes none.

    A pair such as ``(1, 2)`` is read as an interval.
    """
    if builder := _BUILDER.fullmatch(text):
        return _from_inequalities(builder[1].strip())
    member = _MEMBER.match(text)
    variable = member[1] if member else ""
    body = _peeled(text[member.end() :] if member else text)
    pieces: list[Interval] = []
    for part in _CUP.split(body):
        found = _interval(part.strip()) if _CUP.search(body) or member else None
        if found is None:
            break
        pieces += found
    else:
        return RealSet(tuple(pieces), variable)
    if member is None and (found := _interval(body)) is not None:
        return RealSet(tuple(found), "")
    return None if member else _from_inequalities(text)


def _peeled(text: str) -> str:
    return text[1:-1].strip() if text[:1] == "{" and closes_at_end(text) else text


def _interval(text: str) -> list[Interval] | None:
    """One part of a union: an interval, a finite set, or the reals without some points."""
    text = _peeled(text)
    whole, *missing = _WITHOUT.split(text)
    if whole.strip() in _ALL:
        return _reals_without(missing)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        points = split_items(text[2:-2])
        return [Interval(End(p, True), End(p, True)) for p in points if p] if all(points) else None
    if text[:1] in ("(", "[", "]") and text[-1:] in (")", "]", "["):
        ends = split_items(text[1:-1])
        if len(ends) != 2:
            return None
        low, high = _end(ends[0], text[0] == "["), _end(ends[1], text[-1] == "]")
        if low.text == "+" or high.text == "-":
            return None
        return [Interval(low, high)]
    return None


def _reals_without(missing: list[str]) -> list[Interval] | None:
    if not missing:
        return [_REALS]
    if len(missing) > 1 or not re.fullmatch(r"\\\{.*\\\}", missing[0].strip()):
        return None
    points = [quantity(point) for point in split_items(missing[0].strip()[2:-2])]
    values = sorted({str(point.value) for point in points if point}, key=Fraction)
    if None in points:
        return None
    ends = [_NOWHERE, *(End(value, False) for value in values), _EVERYWHERE]
    return [Interval(low, high) for low, high in itertools.pairwise(ends)]


def _end(text: str, is_closed: bool) -> End:
    infinite = _INFINITE.fullmatch(text)
    if infinite:
        return _NOWHERE if infinite[1] == "-" else _EVERYWHERE
    return End(text, is_closed)


def _from_inequalities(text: str) -> RealSet | None:
    pieces: list[Interval] = []
    variables: set[str] = set()
    for part in _OR.split(text):
        found = _from_inequality(part.strip())
        if found is None:
            return None
        variables.add(found[0])
        pieces += found[1]
    return RealSet(tuple(pieces), variables.pop()) if len(variables) == 1 else None


def _from_inequality(text: str) -> tuple[str, list[Interval]] | None:
    """Variable and pieces of ``x < 3``, ``1 < x < 2``, ``x > 1 and x < 2`` or ``x \\ne 2``."""
    parts = _BOTH.split(text)
    if len(parts) == 2:
        return _both(*(_from_inequality(part.strip()) for part in parts))
    if len(parts) > 2:
        return None
    sides, operators = split_relations(text)
    if len(sides) == 3:
        if not _VARIABLE.fullmatch(sides[1]) or not set(operators) <= _MIRROR.keys():
            return None
        if operators[0][0] != operators[1][0]:
            return None
        if operators[0][0] == ">":
            sides.reverse()
            operators.reverse()
        low = _end(sides[0], "=" in operators[0])
        return sides[1], [Interval(low, _end(sides[2], "=" in operators[1]))]
    if len(sides) != 2:
        return None
    (left, right), operator = sides, operators[0]
    if not _VARIABLE.fullmatch(left):
        left, right, operator = right, left, _MIRROR.get(operator, operator)
    if not _VARIABLE.fullmatch(left) or operator == "=" or _names(right, left):
        return None
    if operator == "!=":
        below, above = End(right, False), End(right, False)
        return left, [Interval(_NOWHERE, below), Interval(above, _EVERYWHERE)]
    end = _end(right, "=" in operator)
    piece = Interval(end, _EVERYWHERE) if operator[0] == ">" else Interval(_NOWHERE, end)
    return left, [piece]


_Part = tuple[str, list[Interval]]


def _both(one: _Part | None, other: _Part | None) -> _Part | None:
    """What two rays of one variable, one up and one down, have in common."""
    if one is None or other is None or one[0] != other[0] or len(one[1]) + len(other[1]) != 2:
        return None
    up, down = one[1][0], other[1][0]
    if up.high != _EVERYWHERE:
        up, down = down, up
    is_pair = up.high == _EVERYWHERE and down.low == _NOWHERE
    return (one[0], [Interval(up.low, down.high)]) if is_pair else None


def _names(text: str, variable: str) -> bool:
    return variable in re.sub(r"\\[a-z]+", " ", text)


def same_set(
    given: RealSet, gold: RealSet, agree: Callable[[str, str], bool | None]
) -> bool | None:
    """Whether two sets are equal; ``agree`` compares two ends."""
    if given.variable and gold.variable and given.variable != gold.variable:
        return False
    if max(len(given.pieces), len(gold.pieces)) > _MAX_PIECES:
        return False
    a, b = _merged(given.pieces), _merged(gold.pieces)
    if a is not None and b is not None:
        return a == b
    found = _matches(given.pieces, gold.pieces, agree), _matches(gold.pieces, given.pieces, agree)
    return False if False in found else (None if None in found else True)


def _matches(
    ours: tuple[Interval, ...],
    theirs: tuple[Interval, ...],
    agree: Callable[[str, str], bool | None],
) -> bool | None:
    """Whether each of ``ours`` is among ``theirs``."""
    results = [_any([_same_piece(a, b, agree) for b in theirs]) for a in ours]
    return False if False in results else (None if None in results else True)


def _any(results: list[bool | None]) -> bool | None:
    return True if True in results else (None if None in results else False)


def _same_piece(a: Interval, b: Interval, agree: Callable[[str, str], bool | None]) -> bool | None:
    results: list[bool | None] = []
    for x, y in ((a.low, b.low), (a.high, b.high)):
        if x.is_closed != y.is_closed or (x.text in "-+") != (y.text in "-+"):
            return False
        results.append(x.text == y.text or (x.text not in "-+" and agree(x.text, y.text)))
    return False if False in results else (None if None in results else True)


_Cut = tuple[int, Fraction, int]  # sorts ends: infinity, value, and on which side of the value


def _merged(pieces: tuple[Interval, ...]) -> list[tuple[_Cut, _Cut]] | None:
    """The union with rational ends as disjoint stretches between cuts; None with other ends."""
    stretches = []
    for piece in pieces:
        low, high = _cut(piece.low, is_low=True), _cut(piece.high, is_low=False)
        if low is None or high is None:
            return None
        if low < high:
            stretches.append((low, high))
    merged: list[tuple[_Cut, _Cut]] = []
    for low, high in sorted(stretches):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _cut(end: End, is_low: bool) -> _Cut | None:
    if end.text in ("-", "+"):
        return (-1 if end.text == "-" else 1, Fraction(0), 0)
    found = quantity(end.text)
    if found is None or found.unit:
        return None
    # A closed low end starts just before its value, an open one just after; high ends mirror that.
    return (0, found.value, -1 if is_low == end.is_closed else 1)
