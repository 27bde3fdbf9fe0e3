r"""Decides whether two answers are the same value, exactly.

Numbers, lists, sets, intervals, matrices and words are decided here with ``fractions.Fraction`` in
bounded work, without sympy.  What is left (roots, variables, functions) is decided by
``cosr_jax.verifiers.symbolic``, which runs in killable worker processes only.

Rules, where mathematics leaves a choice:

- A rounded decimal is not the exact value; 56% is 0.56 and not 56.
- A unit, the base of a numeral, am or pm, a name ("x =") may be left out but not be wrong; nothing
  is converted.
- The gold answer says whether order counts.  It does in ``1, 2, 3``.  It does not in
  ``\{1, 2, 3\}`` nor in solutions: ``x = 1, 2``, ``1 \pm \sqrt{2}``, ``(1, 2), (3, 4)``.
- An open interval and a pair look the same and are compared as such; ``1 < x < 2`` fits ``(1, 2)``.
- Matrices agree entry by entry, nested rows included; ratios agree as proportions, but ``3:45`` is
  a time.
- A calculation still to be done (``12+7`` for 19) is the question and not its answer.
- Of an equation that is solved for a variable the solved form is wanted; any other equation agrees
  with its multiples.
- Words are compared as text, without case; single letters with case.  ``(B) 12`` chooses B.
- Text that is no mathematics agrees only with the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from cosr_jax.verifiers import expression, quantities
from cosr_jax.verifiers.cost import evaluated, refusal
from cosr_jax.verifiers.expression import Unreadable
from cosr_jax.verifiers.intervals import looks_like_set, real_set, same_set
from cosr_jax.verifiers.lists import (
    Collection,
    as_point,
    brackets_fit,
    by_name,
    collection,
    has_repeated_name,
)
from cosr_jax.verifiers.notation import (
    closes_at_end,
    matrix,
    normalise,
    peel,
    split_items,
    squeeze,
)
from cosr_jax.verifiers.quantities import quantity
from cosr_jax.verifiers.units import canonical_unit, is_symbol

#: Longer answers agree only if they are the same text.
MAX_CHARS = 1000
_MAX_SET_ITEMS = 30
_MAX_DEPTH = 6

#: Decides two expressions, equations or inequalities that ``symbolic_refusal`` admits.
Symbolic = Callable[[str, str], bool]


def answers_agree(given: str, gold: str, symbolic: Symbolic | None = None) -> bool | None:
    """Whether ``given`` states the value of ``gold``.

    Args:
      given: the student's answer, as extracted.
      gold: the canonical answer.
      symbolic: decides what needs algebra; None to leave that open.

    Returns:
      True or False; None if only ``symbolic`` could tell and there is none.
    """
    if max(len(given), len(gold)) > MAX_CHARS:
        return given.strip() == gold.strip()
    given, gold = normalise(given), normalise(gold)
    if not given or not gold or not re.search(r"\w|\\\{\\\}", given):
        return False
    return _Comparison(symbolic).agree(given, gold)


def restates(prompt: str, given: str, gold: str) -> bool:
    """Whether ``given`` is a calculation copied from ``prompt`` and not the form asked for.

    A division such as 84/7 is a fraction as well, of the right value: without this rule copying
    the question would answer it.
    """
    if max(len(given), len(gold)) > MAX_CHARS:
        return False
    copied = _compact(given)
    is_calculation = re.search(r"[\\+*/^!]|(?<=[0-9A-Za-z)}])-", copied.lstrip("+"))
    if not is_calculation or collection(normalise(given)) or copied == _compact(gold):
        return False
    return bool(re.search(rf"(?<![0-9.]){re.escape(copied)}(?![0-9])", _compact(prompt)))


def _compact(text: str) -> str:
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", normalise(text))
    text = re.sub(r"\\(?:times|cdot)|(?<=[0-9] )x(?= [0-9])", "*", text)
    return re.sub(r"[\s$]", "", text.replace(r"\div", "/"))


# --- Single values ---

_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_NAME = re.compile(
    r"[A-Za-z](?:_?\{?[A-Za-z0-9]\}?)?(?:\([a-z]\))?|\\(?:theta|alpha|beta|lambda)"
    r"|[A-Za-z](?:'{1,3}|\^\{-1\})(?:\([a-z]\))?|\\vec ?\{? ?[A-Za-z] ?\}?"
    r"|\\frac\{d[a-z]?\}\{d[a-z]\}|(?:m ?)?\\angle ?[A-Z]{1,3}"
    r"|[A-Za-z]{3,}(?: [A-Za-z]+){0,4}|\([a-z](?:, ?[a-z])+\)"
)
_MEMBER = re.compile(r"([A-Za-z]) ?\\in(?![A-Za-z]) ?(?=\\\{)")
_LETTER = re.compile(r"[A-Za-z]")
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer) )?(?:\(([A-Ja-j])\)|([A-J])[).:]|([A-J])(?=\Z))(.*)"
)
_ANY_CHOICE = re.compile(r"\([A-Ja-j]\)|\b[A-J]\)|\band\b|,\s*[A-J]\b")
_CALCULATION = re.compile(
    r"[+*!]|\\(?:times|cdot|div)|(?<=[0-9A-Za-z)}\]])\s?-|/.*/|[0-9)}]\s*\(|\|"
)
_RAISED_OR_LOWERED = re.compile(r"[_^]\{[^{}]*\}")
_TRAILING_UNIT = re.compile(
    r"(.*?[0-9A-Za-z)}\]]) "
    r"((?:(?:square|cubic|sq) )?[A-Za-z]+(?:(?:/| per )[A-Za-z]+)?(?:\^\{?[1-9]\}?)?)"
)


def _letter_of_choice(text: str) -> str:
    """``B`` of ``(B)``, ``B.``, ``option B`` and ``(B) 12``; "" if no one letter is chosen."""
    match = _CHOICE.fullmatch(text)
    if match is None or _ANY_CHOICE.search(match[4]):
        return ""
    return match[1] or match[2] or match[3]


def symbolic_refusal(text: str) -> str:
    """Why ``text`` is not shown to sympy: it is no expression, or too expensive; "" if it may be.

    Quotes, attributes and other code are no part of the grammar; towers of powers, large exponents
    and large factorials never reach an evaluator.
    """
    try:
        sides, _ = expression.split_relations(text)
        if len(sides) > 2:
            return "a chain of relations"
        return next(filter(None, (refusal(expression.parse(side)) for side in sides)), "")
    except (Unreadable, RecursionError) as error:
        return f"unreadable: {error}"


class _Comparison:
    """One comparison with all that it leads to; None where only ``symbolic`` could tell."""

    def __init__(self, symbolic: Symbolic | None):
        self._symbolic = symbolic
        self._depth = 0

    def agree(self, given: str, gold: str) -> bool | None:
        """Whether two normalised texts state the same."""
        if not given or not gold:
            return False
        if squeeze(given) == squeeze(gold):
            return True
        self._depth += 1
        try:
            return self._agree(given, gold) if self._depth <= _MAX_DEPTH else False
        finally:
            self._depth -= 1

    def _agree(self, given: str, gold: str) -> bool | None:
        if _LETTER.fullmatch(peel(gold)) and (letter := _letter_of_choice(given)):
            return letter == peel(gold)
        if looks_like_set(given) or looks_like_set(gold):
            wanted, got = real_set(_without_name(gold)), real_set(_without_name(given))
            if wanted is not None and got is not None:
                return same_set(got, wanted, self.agree)
        wanted_rows, got_rows = _rows(gold), _rows(given)
        if wanted_rows is not None and got_rows is not None:
            return self._rows_agree(got_rows, wanted_rows)
        given_name, given_body = _named(given)
        gold_name, gold_body = _named(gold)
        name = gold_name or given_name
        if name and given_name in ("", name):
            gold_items, given_items = collection(gold_body), collection(given_body)
            if gold_items is not None:
                if gold_name and gold_items.brackets == "":
                    gold_items = gold_items._replace(is_ordered=False)
                given_items = given_items or Collection("", (given_body,))
                return self._collections_agree(given_items, gold_items)
        gold_items, given_items = collection(gold), collection(given)
        if gold_items is not None and has_repeated_name(gold_items):
            gold_items = gold_items._replace(is_ordered=False)
        if gold_items is not None and gold_items.brackets == "()" and given_items is not None:
            given_items = as_point(given_items)
        if gold_items is not None:
            return self._collections_agree(given_items or Collection("", (given,)), gold_items)
        if given_items is not None and quantity(given) is None:  # "12 345" may be one number
            return False
        return self._scalars_agree(given, gold)

    def _rows_agree(self, given: list[list[str]], gold: list[list[str]]) -> bool | None:
        if [len(row) for row in given] != [len(row) for row in gold]:
            return False
        return _all(
            self.agree(a, b)
            for ours, theirs in zip(given, gold, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )

    def _collections_agree(self, given: Collection, gold: Collection) -> bool | None:
        if not brackets_fit(given, gold):
            return False
        if not gold.is_ordered or (gold.brackets == given.brackets == "" and not given.is_ordered):
            return self._sets_agree(given.items, gold.items)
        if len(given.items) != len(gold.items):
            return False
        pairs = zip(by_name(given.items), by_name(gold.items), strict=True)
        return _all(self.agree(a, b) for a, b in pairs)

    def _sets_agree(self, given: Sequence[str], gold: Sequence[str]) -> bool | None:
        numbers = [[quantity(item) for item in items] for items in (given, gold)]
        if all(found and not found.unit for items in numbers for found in items):
            ours, theirs = ({found.value for found in items if found} for items in numbers)
            return ours == theirs
        if max(len(given), len(gold)) > _MAX_SET_ITEMS:
            return False
        return _all(
            _any(self.agree(*pair) for pair in pairs)
            for pairs in (
                *([(a, b) for b in gold] for a in given),
                *([(a, b) for a in given] for b in gold),
            )
        )

    def _scalars_agree(self, given: str, gold: str) -> bool | None:
        *given_left, given_value = (peel(part) for part in _EQUALS.split(given))
        *gold_left, gold_value = (peel(part) for part in _EQUALS.split(gold))
        if len(given_left) == 1 and _LETTER.fullmatch(given_value):  # "5 = x"
            given_left, given_value = [given_value], given_left[0]
        given_left, gold_left = (
            [_plain_name(part) for part in left] for left in (given_left, gold_left)
        )
        names = [part for part in given_left if _NAME.fullmatch(part)]
        others = [part for part in given_left if not _NAME.fullmatch(part)]
        if gold_left and not (len(gold_left) == 1 and _NAME.fullmatch(gold_left[0])):
            if len(given_left) != 1 or len(gold_left) != 1:
                return False
            return self._expressions_agree(given, gold)
        if re.search(r"[<>]|\\(?:leq?|geq?|lt|gt)(?![A-Za-z])", gold_value):
            return self._expressions_agree(given, gold)
        if gold_left and any(name != gold_left[0] for name in names):
            return False
        return _all(
            (
                self._values_agree(given_value, gold_value),
                # "12 + 7 = 19": what stands left of the answer must be true as well.
                *(self._expressions_agree(part, gold_value) for part in others),
            )
        )

    def _values_agree(self, given: str, gold: str) -> bool | None:
        if not given or not gold:
            return False
        if squeeze(given) == squeeze(gold):
            return True
        if _LETTER.fullmatch(gold) and _LETTER.fullmatch(given):
            return False
        special = _compare_written(given, gold)
        if special is not None:
            return special
        if _is_text(gold, given) or _is_text(given, gold):
            return given.casefold() == gold.casefold()
        wanted, got = quantity(gold), quantity(given)
        if wanted is None:
            return self._with_units(given, gold)
        if got is not None:
            return got.value == wanted.value and (
                not got.unit or not wanted.unit or got.unit == wanted.unit
            )
        if _CALCULATION.search(_RAISED_OR_LOWERED.sub("", given)):
            return False
        given, unit = _split_unit(given, is_constant=True)
        if unit and wanted.unit and unit != wanted.unit:
            return False
        return self._expressions_agree(given, str(wanted.value))

    def _with_units(self, given: str, gold: str) -> bool | None:
        """Expressions behind which a unit may stand, such as ``2\\sqrt{3} cm``."""
        is_constant = not _has_variables(_split_unit(gold, is_constant=True)[0])
        given_value, given_unit = _split_unit(given, is_constant)
        gold_value, gold_unit = _split_unit(gold, is_constant)
        if given_unit and gold_unit and given_unit != gold_unit:
            return False
        return self._expressions_agree(given_value, gold_value)

    def _expressions_agree(self, given: str, gold: str) -> bool | None:
        if symbolic_refusal(given) or symbolic_refusal(gold):
            return False
        if not any(expression.split_relations(text)[1] for text in (given, gold)):
            try:
                a, b = (expression.rational(expression.parse(text)) for text in (given, gold))
            except Unreadable:  # 1/0
                return False
            if a is not None and b is not None:
                return a == b
        return self._symbolic(given, gold) if self._symbolic else None


def _rows(text: str) -> list[list[str]] | None:
    """Rows of a LaTeX matrix or of nested square brackets."""
    if (found := matrix(text)) is not None:
        factor, rows = found
        return [[_product(factor, cell) for cell in row] for row in rows] if factor else rows
    if not text.startswith("[[") and not text.startswith("[ ["):
        return None
    outer = collection(text) or Collection("[]", (text[1:-1].strip(),))
    items = outer.items if outer.brackets == "[]" and closes_at_end(text) else ()
    if not items or not all(item[:1] == "[" and closes_at_end(item) for item in items):
        return None
    return [split_items(item[1:-1]) for item in items]


def _product(factor: str, cell: str) -> str:
    return evaluated(f"({-1 if factor == '-' else factor})({cell})")


def _named(text: str) -> tuple[str, str]:
    """Name and rest of ``x = 1, 2`` or ``x \\in \\{1, 2\\}``; "" and all of it for others."""
    if member := _MEMBER.match(text):
        return member[1], text[member.end() :]
    name, *rest = _EQUALS.split(text)
    if len(rest) == 1 and _NAME.fullmatch(name.strip()):
        return name.strip(), rest[0].strip()
    return "", text


def _plain_name(text: str) -> str:
    """``a_{n}`` as ``a_n``."""
    return text.replace("{", "").replace("}", "") if re.fullmatch(r"\w_\{\w\}", text) else text


def _without_name(text: str) -> str:
    name, rest = _named(text)
    return rest if len(name) == 1 and name.isupper() else text


def _compare_written(given: str, gold: str) -> bool | None:
    """Times, ratios, numerals with a base and number words; None if it takes something else."""
    wanted_clock, got_clock = quantities.clock(gold), quantities.clock(given)
    if wanted_clock or got_clock:
        return bool(wanted_clock and got_clock and got_clock.fits(wanted_clock))
    if ":" in gold or ":" in given:
        wanted_ratio = quantities.ratio(gold)
        return wanted_ratio is not None and wanted_ratio == quantities.ratio(given)
    wanted_numeral, got_numeral = quantities.numeral(gold), quantities.numeral(given)
    if wanted_numeral:
        return got_numeral == wanted_numeral or given.lstrip("0") == wanted_numeral[0]
    if got_numeral and quantity(gold):
        return False
    wanted, got = quantity(gold), quantity(given)
    if wanted and (word := quantities.number_word(given)) is not None:
        return word == wanted.value
    if got and (word := quantities.number_word(gold)) is not None:
        return word == got.value
    return None


def _is_text(text: str, other: str) -> bool:
    """Whether ``text`` is words; "xy" is a product beside an expression, and a word beside one."""
    return bool(
        _WORDS.fullmatch(text)
        and text not in expression.FUNCTIONS
        and text != "pi"
        and (len(text) > 3 or _WORDS.fullmatch(other))
    )


def _split_unit(text: str, is_constant: bool) -> tuple[str, str]:
    """An expression and the unit behind it, "" for none.

    A single letter is a unit only behind a constant; it may be a variable elsewhere.
    """
    if text.endswith("\u00b0") or ("\u00b0" in text and _has_function(text)):
        return text, ""
    match = _TRAILING_UNIT.fullmatch(text)
    if match is None or not is_symbol(match[2], is_constant):
        return text, ""
    unit = canonical_unit(match[2])
    return (match[1], unit) if unit and unit != "%" else (text, "")


def _has_function(text: str) -> bool:
    return bool(re.search(r"\\?(?:sin|cos|tan|cot|sec|csc)", text))


def _has_variables(text: str) -> bool:
    try:
        return bool(expression.variables(expression.parse(text)))
    except Unreadable:
        return True


def _all(values: Iterable[bool | None]) -> bool | None:
    """Three-valued conjunction: False wins over None, None over True."""
    seen = list(values)
    return False if False in seen else (None if None in seen else True)


def _any(values: Iterable[bool | None]) -> bool | None:
    seen = list(values)
    return True if True in seen else (None if None in seen else False)
