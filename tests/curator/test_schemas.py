"""The JSON schemas say the same as the parser, in what strict structured output accepts."""

import json

import pytest

from cosr_jax.curator.schemas import SCHEMAS, Context, Invalid, json_schema, read_object
from cosr_jax.curator.schemas import response_format as response_format_of
from cosr_jax.types import UserError

CONTEXT = Context(
    known_task_ids=("t2", "t1"),
    known_skills=("carrying", "addition"),
    known_strategies=("raise", "lower"),
    limits={"learning_rate_scale": (0.1, 2.0), "num_tasks": (1, 64), "severity": (0.2, 7.0)},
    max_items=5,
)


def objects(schema):
    """Every object schema inside ``schema``."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_object_is_closed_and_complete(schema):
    found = list(objects(json_schema(schema, CONTEXT)))
    assert found
    for value in found:
        assert value["additionalProperties"] is False
        assert value["required"] == list(value["properties"])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_response_format_is_strict_json(schema):
    made = response_format_of(schema, CONTEXT)
    assert made["json_schema"]["name"] == schema
    assert made["json_schema"]["strict"] is True
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_ids_skills_and_strategies_of_the_call_are_the_enums():
    weakness = json_schema("analysis", CONTEXT)["properties"]["weaknesses"]["items"]["properties"]
    assert weakness["evidence_task_ids"]["items"]["enum"] == ["t1", "t2"]
    assert weakness["skill"]["enum"] == ["addition", "carrying"]
    assert weakness["severity"] == {"type": "number", "minimum": 0.2, "maximum": 1.0}
    plan = json_schema("plan", CONTEXT)["properties"]
    assert plan["strategy"]["enum"] == ["lower", "raise"]
    assert plan["num_tasks"] == {"type": "integer", "minimum": 1, "maximum": 64}
    tasks = json_schema("tasks", CONTEXT)["properties"]["tasks"]
    assert (tasks["minItems"], tasks["maxItems"]) == (1, 5)
    forms = [set(form["properties"]) for form in tasks["items"]["anyOf"]]
    assert [("answer" in form, "tests" in form) for form in forms] == [(True, False), (False, True)]


def test_a_bound_that_is_not_given_is_not_sent():
    plan = json_schema("plan", Context(known_skills=("a",), known_strategies=("b",)))["properties"]
    assert plan["learning_rate_scale"] == {"type": "number", "minimum": 0.0}


@pytest.mark.parametrize("schema", ["analysis", "plan", "tasks"])
def test_an_enum_without_values_is_refused(schema):
    with pytest.raises(UserError, match="no allowed value"):
        json_schema(schema, Context())


def test_a_fold_that_fits_two_names_fits_none():
    context = Context(known_skills=("Add", "add", "sub"), known_strategies=("s",))
    plan = {"strategy": "s", "difficulty": "0", "learning_rate_scale": "1", "num_tasks": "1"}
    assert read_object("plan", {**plan, "focus": ["Add", "SUB"]}, context)["focus"] == [
        "Add",
        "sub",
    ]
    with pytest.raises(Invalid, match="focus is none of the allowed values"):
        read_object("plan", {**plan, "focus": ["ADD"]}, context)
