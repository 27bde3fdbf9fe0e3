r"""Decides whether two answers are the same value, exactly.

Rationals (integers, decimals, fractions, mixed numbers, percentages, with or without a unit),
lists, sets, intervals and words are decided here with ``fractions.Fraction`` in bounded work,
without sympy.  What is left (roots, variables, functions) is decided by
``cosr_jax.verifiers.symbolic``, which runs in killable worker processes only.

Rules, where mathematics leaves a choice:

- A rounded decimal is not the exact value; 56% is 0.56 and not 56.
- A unit may be left out but not be wrong; nothing is converted.
- The gold answer says whether order counts: it does in ``1, 2, 3`` and not in ``\{1, 2, 3\}``.
- A calculation still to be done (``12+7`` for 19) is the question and not its answer.
- Words are compared as text, without case; single letters with case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from cosr_jax.verifiers.units import canonical_unit

#: Longer answers agree only if they are the same text.
MAX_CHARS = 1000
_MAX_SYMBOLIC_CHARS = 300
_MAX_DIGITS = 400
_MAX_SET_ITEMS = 30

#: Decides two expressions that both pass ``symbolic_refusal``.
Symbolic = Callable[[str, str], bool]


class Quantity(NamedTuple):
    """A rational with the unit written behind it, "" for none."""

    value: Fraction
    unit: str


class Collection(NamedTuple):
    """Several items in brackets: "()", "[]", "(]", "[)", "{}" for sets, "" for a bare list."""

    brackets: str
    items: tuple[str, ...]


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
    if not given or not gold:
        return False
    if _COMMA.sub(",", given) == _COMMA.sub(",", gold):
        return True
    gold_list, given_list = collection(gold), collection(given)
    if gold_list is not None:
        given_list = given_list or Collection("", (given,))
        return _collections_agree(given_list, gold_list, symbolic)
    if given_list is not None and quantity(given) is None:  # "12 345" may be one number
        return False
    return _scalars_agree(given, gold, symbolic)


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


_COMMA = re.compile(r"\s*,\s*")
_REPLACED = (
    *(("\u2212", "-"), ("\u2013", "-"), ("\u00d7", r"\times "), ("\u00f7", r"\div ")),
    *(("\u00b2", "^2"), ("\u00b3", "^3"), ("\u03c0", r"\pi "), ("\u00b7", r"\cdot ")),
    *((r"\displaystyle", ""), (r"\!", ""), ("{,}", ",")),
    *((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\%", "%"), (r"\$", "$")),
    *((r"^{\circ}", "\u00b0"), (r"^\circ", "\u00b0"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}")),
    *((f"\\{space}", " ") for space in (",", ";", ":", " ", "quad", "qquad")),
    *((space, " ") for space in ("~", "\u00a0", "\u2009", "\u202f")),
)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\s?\{([^{}]*)\}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")


def normalise(text: str) -> str:
    """One notation for signs, spaces, units and fractions; the value written is left as it is."""
    text = text.strip()
    for left, right in _DELIMITERS:
        inner = text.removeprefix(left).removesuffix(right)
        if len(inner) == len(text) - len(left) - len(right) and left not in inner:
            text = inner.strip()
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = _SIZES.sub("", text)
    text = _TEXT.sub(r" \1 ", text)
    text = " ".join(text.split()).replace(" ^", "^")
    return text[:-1].rstrip() if text.endswith(".") else text


_SIGN = r"(?P<sign>[-+]?)\s?"
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_QUANTITY = re.compile(
    rf"""{_SIGN}(?P<currency>[$\u20ac\u00a3]?)\s?(?P<sign2>[-+]?)(?:
      (?P<repeating>[0-9]*\.[0-9]*)\\overline\s?\{{(?P<period>[0-9]+)\}}
    | (?:(?P<whole>[0-9]+)\s?)?\\frac\s?
        (?:\{{\s?(?P<top>-?[0-9,.]+)\s?\}}|(?P<top1>[0-9]))\s?
        (?:\{{\s?(?P<bottom>-?[0-9,.]+)\s?\}}|(?P<bottom1>[0-9]))
    | (?:(?P<whole2>[0-9]+)\ )?(?P<top2>{_INTEGER.replace(" ", "[ ]")})\s?/\s?(?P<bottom2>[0-9]+)
    | (?P<decimal>{_INTEGER.replace(" ", "[ ]")}(?:\.[0-9]*)?|\.[0-9]+)
      (?:\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?(?:\{{(?P<power>[-+]?[0-9]+)\}}|(?P<power1>[0-9]))
        |[eE](?P<power2>[-+]?[0-9]+))?
    )\s?(?P<unit>.*)""",
    re.VERBOSE,
)


def quantity(text: str) -> Quantity | None:
    """The rational that normalised ``text`` writes, with its unit; None if it is something else."""
    match = _QUANTITY.fullmatch(text)
    if match is None or len(re.findall(r"[0-9]", text)) > _MAX_DIGITS:
        return None
    part = match.groupdict()
    value = _magnitude(part)
    if value is None or (part["sign"] and part["sign2"]):
        return None
    if "-" in (part["sign"], part["sign2"]):
        value = -value
    unit: str | None = part["unit"]
    if unit:
        unit = canonical_unit(unit)
        if unit is None or part["currency"]:
            return None
    elif part["currency"]:
        unit = part["currency"]
    return Quantity(value / 100, "") if unit == "%" else Quantity(value, unit or "")


def _magnitude(part: dict[str, str | None]) -> Fraction | None:
    top = part["top"] or part["top1"] or part["top2"]
    bottom = part["bottom"] or part["bottom1"] or part["bottom2"]
    whole = part["whole"] or part["whole2"]
    if part["period"]:
        digits = (part["repeating"] or "").partition(".")
        nines = (10 ** len(part["period"]) - 1) * 10 ** len(digits[2])
        return Fraction((digits[0] or "0") + "." + (digits[2] or "0")) + Fraction(
            int(part["period"]), nines
        )
    if top and bottom:
        above, below = _decimal(top), _decimal(bottom)
        if above is None or not below:
            return None
        if whole and not 0 <= above < below:
            return None  # 1 7/3 is no mixed number
        return above / below + int(whole or 0)
    value = _decimal(part["decimal"] or "")
    power = part["power"] or part["power1"] or part["power2"]
    if value is None or power is None:
        return value
    if len(power) > 4 or abs(int(power)) > _MAX_DIGITS:
        return None
    return value * Fraction(10) ** int(power)


_DECIMAL = re.compile(rf"-?(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)")


def _decimal(text: str) -> Fraction | None:
    if not _DECIMAL.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").replace(" ", "").removesuffix("."))


_OPENING, _CLOSING = "([{", ")]}"
_AND = re.compile(r",?\s+and\s+")
_SPACED_NUMBERS = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?(?: [-+]?[0-9]+(?:\.[0-9]+)?)+")


def collection(text: str) -> Collection | None:
    """The items of a normalised list, set, tuple or interval; None if ``text`` is one value."""
    if quantity(text) is not None and " " not in text:
        return None
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    if is_set:
        inner, brackets = text[2:-2], "{}"
    elif text[0] in _OPENING and _closes_at_end(text):
        inner, brackets = text[1:-1], text[0] + text[-1]
    else:
        inner, brackets = text, ""
    items = _split(_AND.sub(",", inner))
    if len(items) == 1 and _SPACED_NUMBERS.fullmatch(inner):
        items = inner.split(" ")
    if not is_set and len(items) == 1:
        return None
    return Collection(brackets, tuple(item.strip() for item in items))


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens ``text`` is closed by its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0:
            return i == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """Items between commas or semicolons outside all brackets."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0 and char in ",;":
            items.append(text[start:i])
            start = i + 1
    return [*items, text[start:]]


def _collections_agree(
    given: Collection, gold: Collection, symbolic: Symbolic | None
) -> bool | None:
    if not _brackets_fit(given, gold):
        return False
    if gold.brackets == "{}":
        if max(len(given.items), len(gold.items)) > _MAX_SET_ITEMS:
            return False
        return _all(
            _any(answers_agree(a, b, symbolic) for b in others)
            for items, others in ((given.items, gold.items), (gold.items, given.items))
            for a in items
        )
    if len(given.items) != len(gold.items):
        return False
    pairs = zip(_by_name(given.items), _by_name(gold.items), strict=True)
    return _all(answers_agree(a, b, symbolic) for a, b in pairs)


def _brackets_fit(given: Collection, gold: Collection) -> bool:
    if given.brackets == gold.brackets:
        return True
    if gold.brackets == "":
        return given.brackets in ("()", "[]", "{}")
    # A bare pair could mean a point or an interval, so it fits neither.
    return given.brackets == "" and (
        gold.brackets == "{}" or (gold.brackets == "[]" and len(gold.items) > 2)
    )


_ASSIGNMENT = re.compile(r"\s*([A-Za-z]\w?|\\[a-z]+)\s?=(?!=)")


def _by_name(items: Sequence[str]) -> Sequence[str]:
    """Items in the order of their names, if all have one and all differ: ``y=2, x=1``."""
    names = [m[1] for item in items if (m := _ASSIGNMENT.match(item))]
    if len(set(names)) < len(items):
        return items
    return [item for _, item in sorted(zip(names, items, strict=True))]


_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_NAME = re.compile(r"[A-Za-z](?:_?\{?[A-Za-z0-9]\}?)?(?:\([a-z]\))?|\\(?:theta|alpha|beta|lambda)")
_LETTER = re.compile(r"[A-Za-z]")
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")
_CALCULATION = re.compile(r"[+*!]|\\(?:times|cdot|div)|(?<=[0-9A-Za-z)}\]])\s?-|/.*/")


def _scalars_agree(given: str, gold: str, symbolic: Symbolic | None) -> bool | None:
    *given_left, given = (_peel(part) for part in _EQUALS.split(given))
    *gold_left, gold = (_peel(part) for part in _EQUALS.split(gold))
    names = [part for part in given_left if _NAME.fullmatch(part)]
    others = [part for part in given_left if not _NAME.fullmatch(part)]
    if gold_left and not (len(gold_left) == 1 and _NAME.fullmatch(gold_left[0])):
        # An equation as the answer: side by side, in this order.
        if len(given_left) != len(gold_left):
            return False
        sides = zip((*given_left, given), (*gold_left, gold), strict=True)
        return _all(_values_agree(a, b, symbolic) for a, b in sides)
    if gold_left and any(name != gold_left[0] for name in names):
        return False
    return _all(
        (
            _values_agree(given, gold, symbolic),
            # "12 + 7 = 19": what stands left of the answer must be true as well.
            *(_expressions_agree(part, gold, symbolic) for part in others),
        )
    )


def _peel(text: str) -> str:
    text = text.strip()
    while text and text[0] in "({" and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _values_agree(given: str, gold: str, symbolic: Symbolic | None) -> bool | None:
    if not given or not gold:
        return False
    if given == gold:
        return True
    if _LETTER.fullmatch(gold) and _LETTER.fullmatch(given):
        return False
    if _WORDS.fullmatch(gold) or _WORDS.fullmatch(given):
        return given.casefold() == gold.casefold()
    wanted = quantity(gold)
    if wanted is None:
        return _expressions_agree(given, gold, symbolic)
    got = quantity(given)
    if got is not None:
        return got.value == wanted.value and (
            not got.unit or not wanted.unit or got.unit == wanted.unit
        )
    if _CALCULATION.search(given):
        return False
    return _expressions_agree(given, str(wanted.value), symbolic)


def _expressions_agree(given: str, gold: str, symbolic: Symbolic | None) -> bool | None:
    if symbolic_refusal(given) or symbolic_refusal(gold):
        return False
    return symbolic(given, gold) if symbolic else None


_COMMANDS = """
    frac sqrt pi cdot times div pm mp infty binom overline cup cap in ln log exp sin cos tan cot
    sec csc arcsin arccos arctan sinh cosh tanh alpha beta gamma delta epsilon theta lambda mu
    nu rho sigma tau phi omega le leq ge geq ne neq lt gt begin end pmatrix bmatrix matrix
"""
_ADMITTED = frozenset(_COMMANDS.split())
_FORBIDDEN = re.compile(
    r"[^A-Za-z0-9\s+\-*/^=<>().,{}\[\]|!_\\&]|__|[.]\s*[A-Za-z_]|[A-Za-z_)\]}]\s*[.]"
)
_EXPONENT = re.compile(
    r"(?:\^|\*\*)\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\)|-?\w+|\\pi|.)", re.DOTALL
)
_MAX_EXPONENT = 1000
_MAX_FACTORIAL = 1000
_MAX_INTEGER_DIGITS = 40


def symbolic_refusal(text: str) -> str:
    """Why ``text`` is not shown to sympy: characters, size, or cost; "" if it may be shown.

    Quotes, dunders and attribute access never reach a parser; towers of powers, large exponents
    and large factorials never reach an evaluator.
    """
    if len(text) > _MAX_SYMBOLIC_CHARS:
        return f"longer than {_MAX_SYMBOLIC_CHARS} characters"
    if bad := _FORBIDDEN.search(text):
        return f"contains {bad[0]!r}"
    for command in re.findall(r"\\([A-Za-z]+)", text):
        if command not in _ADMITTED:
            return f"contains \\{command}"
    for word in re.findall(r"[A-Za-z]{4,}", re.sub(r"\\[A-Za-z]+", " ", text)):
        if word not in _ADMITTED:
            return f"contains {word!r}"
    if re.search(r"[0-9][eE][-+]?[0-9]", text):
        return "an exponent of ten out of range"  # those in range are quantities
    if any(len(run) > _MAX_INTEGER_DIGITS for run in re.findall(r"[0-9]+", text)):
        return f"a number of more than {_MAX_INTEGER_DIGITS} digits"
    depth = deepest = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        deepest = max(deepest, depth)
    if depth or deepest > 12:
        return "brackets unbalanced or too deep"
    product = 1
    exponents = list(_EXPONENT.finditer(text))
    for match in exponents:
        body = match[1]
        after = text[match.end() :].lstrip()[:1]
        if not re.search(r"\w", body) or {"^", "!"} & {*body, after} or "**" in body:
            return f"the exponent {body!r}"
        for number in re.findall(r"[0-9]+", body):
            product *= max(1, int(number))
    if r"\binom" in text and re.search(r"[0-9]{4}", text):
        return "a large binomial"
    if product > _MAX_EXPONENT:
        return f"exponents over {_MAX_EXPONENT}"
    for match in re.finditer(r"(.?)\s*!", text):
        number = re.search(r"(?<![0-9.])([0-9]+)\s*!\Z", text[: match.end()])
        if number is None or int(number[1]) > _MAX_FACTORIAL or len(exponents) > 2:
            return f"a factorial of more than {_MAX_FACTORIAL}"
    return ""


def _all(values: Iterable[bool | None]) -> bool | None:
    """Three-valued conjunction: False wins over None, None over True."""
    seen = list(values)
    return False if False in seen else (None if None in seen else True)


def _any(values: Iterable[bool | None]) -> bool | None:
    seen = list(values)
    return True if True in seen else (None if None in seen else False)
