"""Values of a config.json by key, each of the kind that it has to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cosr_jax.types import UserError

Values = Mapping[str, Any]
#: What to do about a file that contradicts itself.
REMEDY = "take the file that came with the weights"


def whole(values: Values, key: str, default: int | None = None, low: int = 1) -> int:
    """A whole number; ``default`` where the key is left out or null.

    Raises:
      UserError: another kind of value, or one under ``low``.
      KeyError: there is neither value nor default.
    """
    value = _value(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise UserError(f"config.json: {key} {value!r:.100} is no whole number", REMEDY)
    if value < low:
        raise UserError(f"config.json: {key} {int(value)} is under {low}", REMEDY)
    return int(value)


def number(values: Values, key: str, default: float | None = None) -> float:
    """A finite number; as ``whole``."""
    value = _value(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"config.json: {key} {value!r:.100} is no number", REMEDY)
    return float(value)


def positive(values: Values, key: str, default: float | None = None) -> float:
    """A number above zero; as ``whole``."""
    value = number(values, key, default)
    if value <= 0:
        raise UserError(f"config.json: {key} {value} is not above 0", REMEDY)
    return value


def flag(values: Values, key: str, default: bool = False) -> bool:
    """True or false; as ``whole``."""
    value = _value(values, key, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} {value!r:.100} is neither true nor false", REMEDY)
    return value


def section(values: Values, key: str) -> Values:
    """An object; an empty one where the key is left out or null.

    Raises:
      UserError: another kind of value.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} {value!r:.100} is no object", REMEDY)
    return value or {}


def listed(values: Values, key: str) -> list[Any] | None:
    """A list; None where the key is left out or null.

    Raises:
      UserError: another kind of value.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise UserError(f"config.json: {key} {value!r:.100} is no list", REMEDY)
    return None if value is None else list(value)


def _value(values: Values, key: str, default: Any) -> Any:
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise KeyError(key)
    return value
