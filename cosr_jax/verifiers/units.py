"""Units of measurement as people write them, brought to one name each.  Nothing is converted."""

from __future__ import annotations

import re

_ALIASES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram kilo",
    "t": "tonne",
    "oz": "ounce",
    "lb": "lbs pound",
    "ml": "mL milliliter millilitre",
    "cl": "cL centiliter centilitre",
    "l": "L liter litre",
    "ms": "millisecond",
    "s": "sec second",
    "min": "minute",
    "h": "hr hrs hour",
    "d": "day",
    "wk": "week",
    "mo": "month",
    "yr": "year",
    "°": "degree deg",
    "°C": "celsius",
    "°F": "fahrenheit",
    "rad": "radian",
    "$": "dollar USD usd",
    "¢": "cent",
    "€": "euro EUR eur",
    "£": "GBP gbp",
    "%": "percent pct",
    "B": "byte",
    "kB": "KB kilobyte",
    "MB": "megabyte",
    "GB": "gigabyte",
    "mph": "",
    "Hz": "hertz",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "ampere amp",
    "K": "kelvin",
    "Pa": "pascal",
}
_CANONICAL = {
    name: unit
    for unit, names in _ALIASES.items()
    for written in (unit, *names.split())
    # Long names have a plural in s; symbols do not ("ms" is no plural of "m").
    for name in ((written, written + "s") if len(written) > 2 else (written,))
}

# Words behind a number that change its value, or say that it is not the answer.
_SCALES = """
    and plus minus times over mod not less more than point negative half halves third thirds
    quarter quarters fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths
    tenth tenths hundredth hundredths thousandth thousandths ten hundred hundreds thousand
    thousands million millions billion billions trillion trillions dozen dozens score squared
    cubed factorial sqrt sin cos tan log exp inf infinity one two three four five six seven
    eight nine zero mil double triple twice about approximately roughly remainder base pi theta
    alpha beta
"""
_NOT_UNITS = frozenset(_SCALES.split())
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_ATOM = re.compile(r"(?:(square|sq|cubic) )?([A-Za-z°$¢€£%]+)(?:\^\{?([1-9])\}?)?")


def canonical_unit(text: str) -> str | None:
    """One name for a unit: "centimetres" -> "cm", "square meters" -> "m^2", "km per h" -> "km/h".

    A noun that is counted ("apples") is its own unit, without the plural.

    Returns:
      None if ``text`` is no unit, e.g. "x" or "thousand".
    """
    atoms = []
    for part in re.split(r"\s*/\s*|\s+per\s+", text.strip()):
        match = _ATOM.fullmatch(part)
        if match is None:
            return None
        name = _canonical_atom(match[2])
        if name is None:
            return None
        power = _POWERS.get(match[1] or "", 1) * int(match[3] or 1)
        atoms.append(name if power == 1 else f"{name}^{power}")
    return "/".join(atoms)


def _canonical_atom(name: str) -> str | None:
    known = _CANONICAL.get(name) or (_CANONICAL.get(name.lower()) if len(name) > 2 else None)
    if known:
        return known
    word = name.lower()
    if len(word) < 3 or not word.isalpha() or word in _NOT_UNITS:
        return None
    return word.removesuffix("s")


def is_symbol(text: str, is_constant: bool) -> bool:
    """Whether ``text`` behind an expression can only be a unit.

    Single letters can where ``is_constant``: "m" behind a number, not behind "2x".
    """
    unit = canonical_unit(text)
    if unit is None:
        return False
    head = re.split(r"[/^ ]", text.strip())[0]
    return len(head) > 1 or is_constant
