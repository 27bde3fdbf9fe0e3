r"""Lists, sets, tuples and intervals: their brackets, their items, and whether order counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from cosr_jax.verifiers.cost import evaluated
from cosr_jax.verifiers.notation import closes_at_end, split_items
from cosr_jax.verifiers.quantities import quantity


class Collection(NamedTuple):
    """Several items in brackets: "()", "[]", "(]", "[)", "{}" for sets, "" for a bare list."""

    brackets: str
    items: tuple[str, ...]
    is_ordered: bool = True


_AND = re.compile(r",?\s+and\s+")
_SPACED_NUMBERS = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?(?: [-+]?[0-9]+(?:\.[0-9]+)?)+")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def collection(text: str) -> Collection | None:
    """The items of a normalised list, set, tuple or interval; None if ``text`` is one value."""
    if not text or (quantity(text) is not None and " " not in text):
        return None
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    if is_set:
        inner, brackets = text[2:-2], "{}"
    elif text[0] in "([{" and closes_at_end(text):
        inner, brackets = text[1:-1], text[0] + text[-1]
    else:
        inner, brackets = text, ""
    items = split_items(_AND.sub(",", inner))
    if len(items) == 1 and _SPACED_NUMBERS.fullmatch(inner):
        items = inner.split(" ")
    items = [signed for item in items for signed in (_both_signs(item) if "\\" in item else [item])]
    if not is_set and len(items) == 1:
        return None
    if is_set and items == [""]:
        items = []
    are_points = all(item[:1] == "(" and len(split_items(item[1:-1])) > 1 for item in items)
    is_ordered = brackets != "{}" and not (brackets == "" and are_points)
    if _PLUS_MINUS.search(inner) and brackets == "":
        is_ordered = False
    return Collection(brackets, tuple(items), is_ordered)


def _both_signs(item: str) -> list[str]:
    r"""``1 \pm 2`` as ``1 + 2`` and ``1 - 2``; brackets keep their ``\pm`` for later."""
    if not _PLUS_MINUS.search(item):
        return [item]
    upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", item)
    lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", item)
    return [evaluated(upper.strip()), evaluated(lower.strip())]


def brackets_fit(given: Collection, gold: Collection) -> bool:
    if given.brackets == gold.brackets:
        return True
    if gold.brackets == "":
        return given.brackets in ("()", "[]", "{}")
    # A bare pair could mean a point or an interval, so it fits neither.
    return given.brackets == "" and (
        gold.brackets == "{}" or (gold.brackets == "[]" and len(gold.items) > 2)
    )


_ASSIGNMENT = re.compile(r"\s*([A-Za-z]\w?|\\[a-z]+)\s?=(?!=)")


def by_name(items: Sequence[str]) -> Sequence[str]:
    """Items in the order of their names, if all have one and all differ: ``y=2, x=1``."""
    names = [m[1] for item in items if (m := _ASSIGNMENT.match(item))]
    if len(set(names)) < len(items):
        return items
    return [item for _, item in sorted(zip(names, items, strict=True))]


def has_repeated_name(items: Collection) -> bool:
    """Whether a bare list repeats one name, as solutions do: ``x = 1, x = 2``."""
    names = [match[1] if (match := _ASSIGNMENT.match(item)) else "" for item in items.items]
    return items.brackets == "" and len(set(names)) == 1 and names[0] != ""


def as_point(items: Collection) -> Collection:
    """``x = 1, y = 2`` as ``(1, 2)``."""
    matches = [_ASSIGNMENT.match(item) for item in items.items]
    names = [match[1] for match in matches if match]
    if items.brackets or sorted(names) != ["x", "y", "z"][: len(items.items)]:
        return items
    values = sorted((match[1], match.string[match.end() :].strip()) for match in matches if match)
    return Collection("()", tuple(value for _, value in values))
