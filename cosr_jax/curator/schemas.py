"""What a curator may answer: one table of fields, read by the parser and sent as JSON schema.

Each field reads an untrusted value without losing anything ("0.5" is 0.5, " Logic" is logic) or
raises ``Invalid``; and it says the same as a JSON schema, with the call's ids and skills as enums,
for ``response_format`` of an OpenAI-compatible server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Protocol

from cosr_jax.curator.repair import Number, strict
from cosr_jax.types import UserError

Schema = Literal["analysis", "plan", "tasks", "opinion", "pointer"]
SCHEMAS: tuple[Schema, ...] = ("analysis", "plan", "tasks", "opinion", "pointer")

KINDS_OF_WEAKNESS = ("format", "knowledge", "logic", "arithmetic", "incomplete")
DOMAINS = ("math", "code")

#: Bounds that hold whatever the call's ``limits`` say.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "severity": (0.0, 1.0),
    "difficulty": (0.0, 1.0),
    "learning_rate_scale": (0.0, math.inf),
    "num_tasks": (0.0, math.inf),
    "occurrence": (1.0, 1e6),
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a call knows; nothing outside it is believed.

    Args:
      known_task_ids: ids that evidence may cite.
      known_skills: what weaknesses, plans and tasks may be about.
      known_strategies: what a plan may choose.
      limits: inclusive bounds by field ("learning_rate_scale", "num_tasks", "severity",
        "difficulty"); the last two are in [0, 1] in any case.
      eval_prompts: no task may contain one of them.
      existing_prompts: no task may repeat one of them.
      max_items: weaknesses or tasks that are kept at most.
      max_string: longest string that is accepted, in characters.
    """

    known_task_ids: Collection[str] = frozenset()  # kept as a frozenset, like the next two
    known_skills: Collection[str] = frozenset()
    known_strategies: Collection[str] = frozenset()
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    eval_prompts: Iterable[str] = ()  # kept as a tuple, like the next one
    existing_prompts: Iterable[str] = ()
    max_items: int = 50
    max_string: int = 20_000

    def __post_init__(self) -> None:
        for name in ("known_task_ids", "known_skills", "known_strategies"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        for name in ("eval_prompts", "existing_prompts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def bounds(self, field: str) -> tuple[float, float]:
        """The inclusive bounds of a number."""
        low, high = _BOUNDS[field]
        given_low, given_high = self.limits.get(field, (low, high))
        return max(low, given_low), min(high, given_high)


class Invalid(Exception):
    """A value that cannot be accepted.

    Args:
      reason: from a small set, for counting: "type", "missing", "enum", "range", "length",
        "evidence".
      detail: for the model that is asked again; quotes nothing but names of fields and ids.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Field(Protocol):
    """One member of an object."""

    def read(self, name: str, value: Any, context: Context) -> Any:
        """The canonical value.

        Raises:
          Invalid: there is none.
        """
        ...

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        """The JSON schema of the canonical value."""
        ...


_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MAX_DIGITS = 400
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _string(name: str, value: Any, context: Context) -> str:
    if not isinstance(value, str):
        raise Invalid("type", f"{name} is no string")
    if len(value) > context.max_string:
        raise Invalid("length", f"{name} has over {context.max_string} characters")
    if _SURROGATE.search(value):
        raise Invalid("type", f"{name} is not valid Unicode")
    return value


@dataclasses.dataclass(frozen=True)
class Text:
    """A string; empty or blank only if ``may_be_blank``."""

    may_be_blank: bool = False

    def read(self, name: str, value: Any, context: Context) -> str:
        text = _string(name, value, context)
        if not (self.may_be_blank or text.strip()):
            raise Invalid("length", f"{name} is empty")
        return text

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        return {"type": "string"}


@dataclasses.dataclass(frozen=True)
class Answer(Text):
    """A maths answer: a string, or a number as it is written."""

    def read(self, name: str, value: Any, context: Context) -> str:
        if isinstance(value, Number):
            _finite(name, value.literal)
            value = value.literal
        return super().read(name, value, context)


@dataclasses.dataclass(frozen=True)
class Flag:
    """true or false, and no word for them."""

    def read(self, name: str, value: Any, context: Context) -> bool:
        if not isinstance(value, bool):
            raise Invalid("type", f"{name} is neither true nor false")
        return value

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclasses.dataclass(frozen=True)
class Real:
    """A number within the bounds of its name."""

    is_integer: bool = False

    def read(self, name: str, value: Any, context: Context) -> float | int:
        if isinstance(value, str) and _JSON_NUMBER.fullmatch(value):
            value = Number(value)
        if not isinstance(value, Number):
            raise Invalid("type", f"{name} is no number")
        number = _finite(name, value.literal)
        low, high = context.bounds(name)
        if not low <= number <= high:
            raise Invalid("range", f"{name} is not within {low:g} and {high:g}")
        if not self.is_integer:
            return number
        try:
            exact = Decimal(value.literal)
        except InvalidOperation:  # an exponent of dozens of digits
            raise Invalid("range", f"{name} overflows") from None
        if exact != exact.to_integral_value():
            raise Invalid("type", f"{name} is no integer")
        return int(exact)

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        low, high = context.bounds(name)
        result: dict[str, Any] = {"type": "integer" if self.is_integer else "number"}
        if math.isfinite(low):
            result["minimum"] = math.ceil(low) if self.is_integer else low
        if math.isfinite(high):
            result["maximum"] = math.floor(high) if self.is_integer else high
        return result


def _finite(name: str, literal: str) -> float:
    number = float(literal)
    # Digits without end would make exact arithmetic slow; a nonzero number must not become zero.
    is_lost = number == 0.0 and re.match(r"[^eE]*[1-9]", literal)
    if not math.isfinite(number) or is_lost or len(literal) > _MAX_DIGITS:
        raise Invalid("range", f"{name} overflows")
    return number


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of fixed words, or of a set that the context names; case and outer blanks are free."""

    words: tuple[str, ...] = ()
    known: str = ""  # field of the context

    def read(self, name: str, value: Any, context: Context) -> str:
        text = _string(name, value, context)
        choices = self._choices(context)
        if text in choices:
            return text
        matches = _by_fold(choices).get(text.strip().casefold(), ())
        if len(matches) != 1:
            raise Invalid("enum", f"{name} is none of the allowed values")
        return matches[0]

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        return _enum(self._choices(context), name)

    def _choices(self, context: Context) -> frozenset[str]:
        return frozenset(self.words) or getattr(context, self.known)


@functools.lru_cache(maxsize=64)
def _by_fold(choices: frozenset[str]) -> Mapping[str, Sequence[str]]:
    result: dict[str, list[str]] = {}
    for word in choices:
        result.setdefault(word.strip().casefold(), []).append(word)
    return result


@dataclasses.dataclass(frozen=True)
class Choices:
    """A list of choices, possibly empty."""

    of: Choice

    def read(self, name: str, value: Any, context: Context) -> list[str]:
        return [self.of.read(name, item, context) for item in _list(name, value)]

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        items = self.of.schema(name, context)
        return {"type": "array", "items": items, "maxItems": len(items["enum"])}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Ids of tasks.  Unknown ones go (see ``unknown_ids``), and at least one must remain."""

    def read(self, name: str, value: Any, context: Context) -> list[str]:
        ids = [item for item in _list(name, value) if _is_known(item, context)]
        if not ids:
            raise Invalid("evidence", f"{name} cites no known id")
        return ids

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        items = _enum(context.known_task_ids, name)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": len(items["enum"])}


def _is_known(item: Any, context: Context) -> bool:
    return isinstance(item, str) and item in context.known_task_ids


def unknown_ids(value: Any, context: Context) -> list[str]:
    """The strings among a weakness's evidence that are no known ids."""
    ids = value.get("evidence_task_ids") if isinstance(value, dict) else None
    if not isinstance(ids, list):
        return []
    return [item for item in ids if isinstance(item, str) and not _is_known(item, context)]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A list of strings that are not blank; at least one."""

    def read(self, name: str, value: Any, context: Context) -> list[str]:
        texts = [Text().read(name, item, context) for item in _list(name, value)]
        if not texts:
            raise Invalid("length", f"{name} is empty")
        return texts

    def schema(self, name: str, context: Context) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string"}, "minItems": 1}


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # else it is not a list encoded as a string
            value = strict(value)
    if not isinstance(value, list):
        raise Invalid("type", f"{name} is no list")
    return value


def _enum(choices: Collection[str], name: str) -> dict[str, Any]:
    if not choices:
        raise UserError(
            f"a schema with no allowed value of {name}", "give the call's ids, skills, strategies"
        )
    return {"type": "string", "enum": sorted(choices)}


_SKILL = Choice(known="known_skills")
_WEAKNESS: Mapping[str, Field] = {
    "skill": _SKILL,
    "kind": Choice(KINDS_OF_WEAKNESS),
    "evidence_task_ids": Evidence(),
    "severity": Real(),
    "rationale": Text(may_be_blank=True),
}
_PLAN: Mapping[str, Field] = {
    "strategy": Choice(known="known_strategies"),
    "focus": Choices(_SKILL),
    "difficulty": Real(),
    "learning_rate_scale": Real(),
    "num_tasks": Real(is_integer=True),
}
_TASK_OF_DOMAIN: Mapping[str, Mapping[str, Field]] = {
    domain: {
        "prompt": Text(),
        "domain": Choice((domain,)),
        **({"answer": Answer()} if domain == "math" else {"tests": Texts()}),
        "reference_solution": Text(),
        "difficulty": Real(),
        "skill": _SKILL,
    }
    for domain in DOMAINS
}
_OPINION: Mapping[str, Field] = {"fails": Flag(), "quote": Text(may_be_blank=True)}
_POINTER: Mapping[str, Field] = {
    "quote": Text(may_be_blank=True),
    "occurrence": Real(is_integer=True),
}
#: Schemas of one object, which is taken whole or not at all.
OF_ONE: Mapping[Schema, Mapping[str, Field]] = {
    "plan": _PLAN,
    "opinion": _OPINION,
    "pointer": _POINTER,
}
#: The key under which the items of the other schemas stand.
ITEMS_KEY: Mapping[Schema, str] = {"analysis": "weaknesses", "tasks": "tasks"}


def read_object(schema: Schema, value: Any, context: Context) -> dict[str, Any]:
    """One weakness, plan, task or opinion in its canonical form; what nobody asked for goes.

    Raises:
      Invalid: it cannot be accepted.
    """
    if not isinstance(value, dict):
        raise Invalid("type", "it is no object")
    if schema == "tasks":
        domain = Choice(DOMAINS).read("domain", value.get("domain"), context)
        fields = _TASK_OF_DOMAIN[domain]
    else:
        fields = OF_ONE.get(schema, _WEAKNESS)
    for name in fields:
        if name not in value:
            raise Invalid("missing", f"{name} is missing")
    return {name: field.read(name, value[name], context) for name, field in fields.items()}


def json_schema(schema: Schema, context: Context) -> dict[str, Any]:
    """The JSON schema of an answer to this call.

    It keeps to what strict structured output accepts: every property is required, none may be
    added, and alternatives are ``anyOf``.  ``max_string`` is left to the parser, as servers differ
    in ``maxLength``.

    Raises:
      UserError: the context allows no value for some enum.
    """
    if schema in OF_ONE:
        return _object(OF_ONE[schema], context)
    if schema == "analysis":
        items = _object(_WEAKNESS, context)
    else:
        items = {"anyOf": [_object(fields, context) for fields in _TASK_OF_DOMAIN.values()]}
    key = ITEMS_KEY[schema]
    array: dict[str, Any] = {"type": "array", "items": items, "maxItems": context.max_items}
    if schema == "tasks":
        array["minItems"] = 1
    return _strict_object({key: array})


def response_format(schema: Schema, context: Context) -> dict[str, Any]:
    """``json_schema`` as the ``response_format`` of a chat completion."""
    return {
        "type": "json_schema",
        "json_schema": {"name": schema, "strict": True, "schema": json_schema(schema, context)},
    }


def _object(fields: Mapping[str, Field], context: Context) -> dict[str, Any]:
    return _strict_object({name: field.schema(name, context) for name, field in fields.items()})


def _strict_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
