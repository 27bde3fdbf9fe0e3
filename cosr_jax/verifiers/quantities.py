r"""Values that are written with digits: rationals with units, clock times, ratios, numerals.

All of it is exact, in bounded work, on text that ``notation.normalise`` has seen.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from cosr_jax.verifiers.units import canonical_unit

MAX_DIGITS = 400


class Quantity(NamedTuple):
    """A rational with the unit written behind it, "" for none."""

    value: Fraction
    unit: str


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
    if match is None or len(re.findall(r"[0-9]", text)) > MAX_DIGITS:
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
    if len(power) > 4 or abs(int(power)) > MAX_DIGITS:
        return None
    return value * Fraction(10) ** int(power)


_DECIMAL = re.compile(rf"-?(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)")


def _decimal(text: str) -> Fraction | None:
    if not _DECIMAL.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").replace(" ", "").removesuffix("."))


class Clock(NamedTuple):
    """A time of day, or a duration: hours, minutes and perhaps seconds; "" for no am or pm."""

    parts: tuple[int, ...]
    half: str

    def fits(self, other: Clock) -> bool:
        """Whether both may be the same time: am and pm may be left out but not be wrong."""
        if self.half != other.half and self.parts == other.parts:
            return not (self.half and other.half)
        return self._of_day() == other._of_day()

    def _of_day(self) -> tuple[int, ...]:
        hour, *rest = self.parts
        if self.half:
            hour = hour % 12 + (12 if self.half == "p" else 0)
        return (hour, *rest)


_CLOCK = re.compile(
    r"([0-9]{1,2}) ?: ?([0-5][0-9])(?: ?: ?([0-5][0-9]))?(?: ?([aApP])\.? ?[mM]\.?)?"
)


def clock(text: str) -> Clock | None:
    """``3:45``, ``3:45 pm``, ``1:02:03``; None for anything else."""
    match = _CLOCK.fullmatch(text)
    if match is None or int(match[1]) > 24:
        return None
    return Clock(tuple(int(part) for part in match.groups()[:3] if part), (match[4] or "").lower())


def ratio(text: str) -> tuple[Fraction, ...] | None:
    """The parts of ``3:2`` or ``1/2 : 1 : 3``, divided by the last; None for anything else."""
    parts = [quantity(part.strip()) for part in text.split(":")]
    if len(parts) < 2 or clock(text) is not None:
        return None
    values = [part.value for part in parts if part is not None and not part.unit]
    if len(values) < len(parts) or not all(values):
        return None
    return tuple(value / values[-1] for value in values)


_NUMERAL = re.compile(r"\(?([0-9A-Z]+(?:\.[0-9A-Z]+)?)\)?_ ?\{? ?([0-9]{1,2}|[a-z]+) ?\}?")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_BASES |= {"ten": 10, "twelve": 12, "sixteen": 16}


def numeral(text: str) -> tuple[str, int] | None:
    r"""Digits and base of ``101_2``, ``2A_{16}``, ``12_{\text{eight}}``; None for anything else."""
    match = _NUMERAL.fullmatch(text)
    if match is None:
        return None
    base = int(match[2]) if match[2].isdigit() else _BASES.get(match[2], 0)
    if not 2 <= base <= 36:
        return None
    digits = match[1].replace(".", "")
    if any(int(digit, 36) >= base for digit in digits) or (not digits[0].isdigit() and base < 11):
        return None
    return match[1].lstrip("0") or "0", base


_UNITS_AND_TEENS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_UNITS_AND_TEENS.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}


def number_word(text: str) -> Fraction | None:
    """The value of a number under a hundred in English words; None for anything else."""
    words = text.lower().replace("-", " ").split()
    values = [_WORDS.get(word) for word in words]
    match values:
        case [int(value)]:
            return Fraction(value)
        case [int(tens), int(ones)] if tens >= 20 and 0 < ones < 10:
            return Fraction(tens + ones)
    return None
