"""Cases and answers as JSON objects: what ``cosr verify --stdio`` and the HTTP service speak.

    code    {"id", "type": "code", "completion", "entry_point", "tests": str or [str], "limits"}
            {"id", "type": "code", "completion", "io": [{"stdin", "stdout"}], "limits"}
    maths   {"id", "type": "math", "completion", "gold", "limits"}
    proof   {"id", "type": "proof", "completion", "kind", "goal", "instance", "limits"}
    web     {"id", "type": "web", "completion", "requirements", "limits"}
    gym     {"id", "type": "gym", "completion", "generator", "item", "limits"}
    answer  {"id", "verdict": "pass" | "fail" | "error", "score", "category", "wall_s"}

Every case may carry "prompt" (an answer that only restates it fails), "finish_reason" ("length" if
the token limit cut the completion) and "verbose": true, which adds "answer", "method",
"value_correct", "is_subjective" and "detail" to its answer.  "limits" may name ``wall_s``,
``memory_mb``, ``output_kb`` and ``file_mb``; what it leaves out takes the default.  The score of an
error is null: nothing was judged.  Unknown fields are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from cosr_jax.types import (
    Checks,
    CodeChecks,
    Completion,
    Domain,
    Outcome,
    ProofChecks,
    ScorerChecks,
    Task,
    Verdict,
    WebChecks,
)
from cosr_jax.verifiers.judges import Limits

#: Raised when a case or an answer changes its meaning; client and server compare it.
PROTOCOL_VERSION = 1

#: Most that a case may ask for; more is a mistake, such as bytes for MiB.
_MOST = Limits(wall_s=3600.0, memory_mb=2**20, output_kb=2**20, file_mb=2**20)
_EXTRAS = ("answer", "method", "value_correct", "is_subjective", "detail")
_ID = re.compile(r'"id"\s*:\s*')


class BadCase(ValueError):
    """Text that is no case; ``case_id`` is its id where that can be read."""

    def __init__(self, message: str, case_id: Any = None):
        super().__init__(message)
        self.case_id = case_id


@dataclasses.dataclass(frozen=True)
class Case:
    """One case, ready to be judged."""

    id: Any  # opaque: any JSON value
    task: Task
    completion: Completion
    limits: Limits
    is_verbose: bool = False


def parse_case(text: str | bytes, defaults: Limits) -> Case:
    """Reads one JSON object.

    Args:
      text: the object, UTF-8 if bytes.
      defaults: for limits that the case leaves out.

    Raises:
      BadCase: it is no case; the message says why.
    """
    values = _parse_object(text)
    case_id = values.get("id")
    try:
        return Case(
            id=case_id,
            task=_task(values),
            completion=Completion(
                (),
                (),
                _text(values, "completion"),
                _choice(values, "finish_reason", ("stop", "length"), "stop"),
            ),
            limits=_limits(values.get("limits"), defaults),
            is_verbose=values.get("verbose") is True,
        )
    except BadCase as error:
        raise BadCase(str(error), case_id) from None


def case_dict(case: Case) -> dict[str, Any]:
    """The object that ``parse_case`` reads."""
    task, checks = case.task, case.task.checks
    values: dict[str, Any] = {
        "id": case.id,
        "type": task.domain,
        "completion": case.completion.text,
        "finish_reason": case.completion.finish_reason,
        "prompt": task.prompt,
        "limits": dataclasses.asdict(case.limits),
        "verbose": case.is_verbose,
    }
    if checks is None:
        return values | {"gold": task.answer}
    if not isinstance(checks, CodeChecks):
        return values | dataclasses.asdict(checks)
    if not checks.io:
        return values | {"entry_point": checks.entry_point, "tests": checks.tests}
    return values | {"io": [{"stdin": given, "stdout": wanted} for given, wanted in checks.io]}


def answer_dict(case_id: Any, verdict: Verdict, is_verbose: bool = False) -> dict[str, Any]:
    """The answer to the case ``case_id``."""
    is_judged = verdict.outcome is not Outcome.ERROR
    answer = {
        "id": case_id,
        "verdict": verdict.outcome.value,
        "score": verdict.reward if is_judged else None,
        "category": verdict.category,
        "wall_s": round(verdict.seconds, 6),
    }
    if is_verbose:
        answer |= {name: getattr(verdict, name) for name in _EXTRAS}
    return answer


def verdict_of(answer: Any) -> Verdict:
    """The verdict in a verbose ``answer_dict``.

    Raises:
      ValueError: it is none.
    """
    try:
        outcome, score = Outcome(answer["verdict"]), answer["score"]
        verdict = Verdict(
            outcome=outcome,
            reward=0.0 if outcome is Outcome.ERROR else float(score),
            category=answer["category"],
            seconds=float(answer["wall_s"]),
            **{name: answer[name] for name in _EXTRAS},
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"not an answer: {answer!r:.200}") from error
    if not 0.0 <= verdict.reward <= 1.0:
        raise ValueError(f"not a score: {score!r}")
    return verdict


def error_verdict(detail: str) -> Verdict:
    """An ERROR of the verifier's own."""
    return Verdict(Outcome.ERROR, 0.0, detail=detail)


def _parse_object(text: str | bytes) -> dict[str, Any]:
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        values = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadCase(f"no JSON: {error}", salvaged_id(text)) from None
    if not isinstance(values, dict):
        raise BadCase(f"no JSON object but {type(values).__name__}")
    return values


def salvaged_id(text: str | bytes) -> Any:
    """The value of the first "id" in text that is no JSON; None if that cannot be read either."""
    head = text[:65536]
    if isinstance(head, bytes):
        head = head.decode("utf-8", "replace")
    match = _ID.search(head)
    if match is None:
        return None
    try:
        decoder = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
        return decoder.raw_decode(head, match.end())[0]
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _task(values: Mapping[str, Any]) -> Task:
    domain = values.get("type")
    if not isinstance(domain, str) or domain not in _READERS:
        raise BadCase(f"type is {domain!r:.100}, not one of {', '.join(_READERS)}")
    answer, checks = _READERS[domain](values)
    return Task(
        cast(Domain, domain),
        skill="",
        difficulty=0.0,
        prompt=_text(values, "prompt", ""),
        answer=answer,
        key=f"{values.get('id')}"[:100],
        checks=checks,
    )


def _read_math(values: Mapping[str, Any]) -> tuple[str, None]:
    gold = values.get("gold")
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        return str(gold), None
    return _text(values, "gold"), None


def _read_code(values: Mapping[str, Any]) -> tuple[str, Checks]:
    entry_point = values.get("entry_point")
    if entry_point is not None and not isinstance(entry_point, str):
        raise BadCase(f"entry_point is {entry_point!r:.100}, not a name")
    tests, io = values.get("tests"), values.get("io")
    if tests is not None and io is not None:
        raise BadCase("tests and io exclude each other")
    if io is not None:
        pairs = tuple((_text(pair, "stdin", ""), _text(pair, "stdout")) for pair in _items(io))
        if not pairs:
            raise BadCase("io is empty")
        return "", CodeChecks(io=pairs)
    tests = (tests,) if isinstance(tests, str) else tests
    if not isinstance(tests, (list, tuple)) or not all(isinstance(test, str) for test in tests):
        raise BadCase("tests are missing, or neither a string nor a list of strings")
    if not any(test.strip() for test in tests):
        raise BadCase("tests are empty")
    return "", CodeChecks(entry_point=entry_point or "", tests=tuple(tests))


def _read_proof(values: Mapping[str, Any]) -> tuple[str, Checks]:
    kind = _choice(values, "kind", ("smtlib", "property", "witness"))
    return "", ProofChecks(kind, _text(values, "goal"), _json_text(values, "instance", ""))


def _read_web(values: Mapping[str, Any]) -> tuple[str, Checks]:
    return "", WebChecks(_json_text(values, "requirements"))


def _read_gym(values: Mapping[str, Any]) -> tuple[str, Checks]:
    return "", ScorerChecks(_text(values, "generator"), _json_text(values, "item"))


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, Checks | None]]] = {
    "math": _read_math,
    "code": _read_code,
    "proof": _read_proof,
    "web": _read_web,
    "gym": _read_gym,
}


def _items(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadCase("io is not a list of objects")
    return value


def _text(values: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadCase(f"{name} is {value!r:.100}, not a string")
    return value


def _json_text(values: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field whose text is JSON: the value itself may be given instead."""
    value = values.get(name)
    return _text(values, name, default) if value is None or isinstance(value, str) else _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _choice(
    values: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str | None = None
) -> Any:
    value = _text(values, name, default)
    if value not in choices:
        raise BadCase(f"{name} is {value!r:.100}, not one of {', '.join(choices)}")
    return value


def _limits(values: Any, defaults: Limits) -> Limits:
    if values is None:
        return defaults
    if not isinstance(values, dict):
        raise BadCase(f"limits is {values!r:.100}, not an object")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Limits):
        value = values.get(field.name)
        if value is None:
            continue
        most = getattr(_MOST, field.name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= most:
            raise BadCase(f"limits.{field.name} is {value!r:.100}, not a number over 0 to {most}")
        given[field.name] = float(value) if field.name == "wall_s" else math.ceil(value)
    return dataclasses.replace(defaults, **given)
