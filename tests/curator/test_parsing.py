"""The rules of parsing, one by one; ``test_parsing_corpus`` runs them over raw outputs."""

import dataclasses
import json

import pytest

from cosr_jax.curator import parsing
from cosr_jax.curator.parsing import Response, parse
from cosr_jax.curator.schemas import Context

CONTEXT = Context(
    known_task_ids=("t1", "t2", "t3"),
    known_skills=("addition", "carrying"),
    known_strategies=("raise", "lower"),
    limits={"learning_rate_scale": (0.1, 2.0), "num_tasks": (1, 64)},
)
WEAKNESS = {
    "skill": "addition",
    "kind": "logic",
    "evidence_task_ids": ["t1"],
    "severity": 0.5,
    "rationale": "drops the carry",
}
PLAN = {
    "strategy": "raise",
    "focus": ["addition"],
    "difficulty": 0.5,
    "learning_rate_scale": 1.0,
    "num_tasks": 12,
}
TASK = {
    "prompt": "Compute 12 + 7.",
    "domain": "math",
    "answer": "19",
    "reference_solution": "12 + 7 = 19, so \\boxed{19}",
    "difficulty": 0.25,
    "skill": "addition",
}


def read(schema, content, **kwargs):
    return parse(schema, Response(content, **kwargs), CONTEXT)


def test_valid_values_come_back_as_they_are():
    for schema, value in (
        ("analysis", {"weaknesses": [WEAKNESS]}),
        ("plan", PLAN),
        ("tasks", {"tasks": [TASK]}),
    ):
        result = read(schema, json.dumps(value))
        assert result.value == value
        assert (result.error, result.drops) == ("", ())


def test_a_response_of_any_kind_with_the_four_attributes_is_read():
    @dataclasses.dataclass
    class Reply:
        content: str = json.dumps(PLAN)
        reasoning: None = None
        refusal: None = None
        finish_reason: str = "stop"
        tokens: int = 9

    assert parse("plan", Reply(), CONTEXT).value == PLAN


def test_an_unknown_schema_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="'plans' is none of analysis, plan, tasks"):
        parse("plans", Response("{}"), CONTEXT)


def test_content_over_the_limit_is_not_parsed(monkeypatch):
    padded = json.dumps(PLAN).ljust(parsing.MAX_CHARS)
    assert read("plan", padded).value == PLAN
    monkeypatch.setattr(parsing, "strict", lambda text: pytest.fail("it was parsed"))
    assert read("plan", padded + " ").error == "too_large"
