"""Cases and answers in JSON: what is read, what is refused, and that nothing else happens."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.types import (
    CodeChecks,
    Completion,
    Outcome,
    ProofChecks,
    ScorerChecks,
    Task,
    Verdict,
    WebChecks,
)
from cosr_jax.verifiers import wire
from cosr_jax.verifiers.judges import Limits

DEFAULTS = Limits(wall_s=3.0, memory_mb=100, output_kb=10, file_mb=1)
MATH = {"id": 1, "type": "math", "completion": "4", "gold": "4"}
CODE = {"id": 1, "type": "code", "completion": "x", "entry_point": "f", "tests": "assert f()"}


def parse(values):
    return wire.parse_case(json.dumps(values), DEFAULTS)


def test_a_maths_case():
    case = parse(MATH)
    assert (case.id, case.task.domain, case.task.answer) == (1, "math", "4")
    assert case.completion == Completion((), (), "4", "stop")
    assert case.limits == DEFAULTS
    assert not case.is_verbose


@pytest.mark.parametrize(("gold", "answer"), [(4, "4"), (2.5, "2.5"), ("x+1", "x+1")])
def test_a_gold_answer_may_be_a_number(gold, answer):
    assert parse(MATH | {"gold": gold}).task.answer == answer


@pytest.mark.parametrize(
    ("fields", "checks"),
    [
        ({}, CodeChecks("f", ("assert f()",))),
        ({"tests": ["assert f()", "assert f(1)"]}, CodeChecks("f", ("assert f()", "assert f(1)"))),
        ({"entry_point": None}, CodeChecks("", ("assert f()",))),
        (
            {"entry_point": None, "tests": None, "io": [{"stdin": "1", "stdout": "2"}]},
            CodeChecks(io=(("1", "2"),)),
        ),
        ({"tests": None, "io": [{"stdout": ""}]}, CodeChecks(io=(("", ""),))),
    ],
)
def test_code_cases(fields, checks):
    assert parse(CODE | fields).task.checks == checks


@pytest.mark.parametrize("instance", ['{"n": [1, 2]}', {"n": [1, 2]}])
def test_json_fields_may_be_given_as_they_are(instance):
    values = {"id": 1, "type": "proof", "completion": "x", "kind": "witness", "goal": "colouring"}
    checks = parse(values | {"instance": instance}).task.checks
    assert checks == ProofChecks("witness", "colouring", '{"n": [1, 2]}')


@pytest.mark.parametrize("case_id", [0, "", "a", None, 1.5, True, [1, {"a": None}], {}, "\ud800"])
def test_ids_are_opaque(case_id):
    case = parse(MATH | {"id": case_id})
    answer = wire.answer_dict(case.id, Verdict(Outcome.PASS, 1.0))
    assert json.loads(json.dumps(answer))["id"] == case_id


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, DEFAULTS),
        ({}, DEFAULTS),
        ({"wall_s": 1}, dataclasses.replace(DEFAULTS, wall_s=1.0)),
        ({"memory_mb": 64.5, "colour": "red"}, dataclasses.replace(DEFAULTS, memory_mb=65)),
        ({"wall_s": None, "output_kb": 1, "file_mb": 2}, Limits(3.0, 100, 1, 2)),
    ],
)
def test_missing_and_unknown_limits_take_defaults(given, expected):
    assert parse(MATH | {"limits": given}).limits == expected


@pytest.mark.parametrize("name", ["wall_s", "memory_mb", "output_kb", "file_mb"])
@pytest.mark.parametrize("value", [0, -1, "5", True, [1], {}, 1e300, 10**30])
def test_garbage_limits_are_refused(name, value):
    with pytest.raises(wire.BadCase, match=f"limits.{name} is ") as caught:
        parse(MATH | {"limits": {name: value}})
    assert caught.value.case_id == 1


@pytest.mark.parametrize(
    "values",
    [
        {"limits": 5},
        {"type": "maths"},
        {"type": None},
        {"type": ["math"]},
        {"completion": None},
        {"completion": 4},
        {"gold": None},
        {"gold": True},
        {"gold": [4]},
        {"finish_reason": "tired"},
        {"prompt": 5},
        {"type": "code"},
        {"type": "code", "tests": []},
        {"type": "code", "tests": " \n"},
        {"type": "code", "tests": ["assert f()", 5]},
        {"type": "code", "tests": {"a": 1}},
        {"type": "code", "tests": "assert f()", "entry_point": 5},
        {"type": "code", "io": []},
        {"type": "code", "io": {"stdin": "", "stdout": ""}},
        {"type": "code", "io": [{"stdin": "1"}]},
        {"type": "code", "io": [["1", "2"]]},
        {"type": "code", "io": [{"stdin": "", "stdout": ""}], "tests": "assert f()"},
        {"type": "proof"},
        {"type": "proof", "kind": "hope", "goal": "x"},
        {"type": "web"},
        {"type": "gym", "generator": "x"},
    ],
)
def test_other_garbage_is_refused_with_its_id(values):
    with pytest.raises(wire.BadCase) as caught:
        parse({**MATH, **values})
    assert caught.value.case_id == 1


@pytest.mark.parametrize(
    ("text", "case_id"),
    [
        ("", None),
        ("nonsense", None),
        ('{"id": 7, "type": "math", ', 7),
        ('{"type": "math", "id": "seven", "completion": "\\ud8"', "seven"),
        ('{"id": [1, 2], "limits": {"wall_s": NaN}}', [1, 2]),
        ('{"id": 7, "limits": {"wall_s": 1e999}}', 7),
        ('{"id": 7, "n": ' + "9" * 5000 + "}", 7),
        ('{"id": 7, "deep": ' + "[" * 100_000, 7),
        ('{"id": ' + "[" * 100_000, None),
        ('{"id": NaN}', None),
        ("[1]", None),
        ('"id"', None),
        (b'{"id": 7, "completion": "\xff"}', 7),
        (b"\xff\xfe", None),
    ],
)
def test_what_is_no_json_is_refused_with_its_id_if_that_can_be_read(text, case_id):
    with pytest.raises(wire.BadCase) as caught:
        wire.parse_case(text, DEFAULTS)
    assert caught.value.case_id == case_id


def test_a_byte_order_mark_is_no_mistake():
    assert wire.parse_case(b"\xef\xbb\xbf" + json.dumps(MATH).encode(), DEFAULTS).id == 1


@pytest.mark.parametrize(
    "task",
    [
        Task("math", "", 0.0, "What is 2+2?", "4", "7"),
        Task("code", "", 0.0, "", "", "7", checks=CodeChecks("f", ("assert f()", "x = f()"))),
        Task("code", "", 0.0, "", "", "7", checks=CodeChecks(io=(("1\n", "2\n"), ("", "")))),
        Task("proof", "", 0.0, "", "", "7", checks=ProofChecks("smtlib", "(assert true)")),
        Task("proof", "", 0.0, "", "", "7", checks=ProofChecks("witness", "factors", "[6]")),
        Task("web", "", 0.0, "", "", "7", checks=WebChecks('{"title": "x"}')),
        Task("gym", "", 0.0, "", "", "7", checks=ScorerChecks("chess", '{"item": 1}')),
    ],
    ids=lambda task: task.domain,
)
def test_cases_survive_the_trip(task):
    case = wire.Case(7, task, Completion((), (), "é\ud800", "length"), Limits(1.0, 2, 3, 4), True)
    assert parse(wire.case_dict(case)) == case


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(Outcome.PASS, 1.0, "", "4", "boxed", True, 0.25, "", False),
        Verdict(Outcome.FAIL, 0.5, "wrong_answer", "5", "hashes", False, 1.0, "2 of 4", True),
        Verdict(Outcome.ERROR, 0.0, detail="died"),
    ],
)
def test_verbose_answers_survive_the_trip(verdict):
    answer = json.loads(json.dumps(wire.answer_dict("x", verdict, is_verbose=True)))
    assert wire.verdict_of(answer) == verdict


def test_plain_answers_have_the_five_fields_of_the_contract():
    answer = wire.answer_dict("x", Verdict(Outcome.FAIL, 0.0, "timeout", seconds=1.5, detail="d"))
    assert answer == {
        "id": "x",
        "verdict": "fail",
        "score": 0.0,
        "category": "timeout",
        "wall_s": 1.5,
    }


def test_an_error_has_no_score():
    assert wire.answer_dict(1, wire.error_verdict("x"))["score"] is None


@pytest.mark.parametrize("answer", [None, [], {}, {"verdict": "pass"}, {"verdict": "perhaps"}])
def test_what_is_no_answer_is_refused(answer):
    with pytest.raises(ValueError, match=r"answer|perhaps"):
        wire.verdict_of(answer)


def test_a_score_out_of_range_is_no_answer():
    good = wire.answer_dict(1, Verdict(Outcome.PASS, 1.0), is_verbose=True)
    with pytest.raises(ValueError, match="score"):
        wire.verdict_of(good | {"score": 1.5})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["id", "type", "completion", "gold", "tests", "io", "entry_point", "limits", "kind", "goal"]
)


@given(st.dictionaries(FIELDS, JSON | st.sampled_from(["math", "code", "proof", "web", "gym"])))
def test_any_object_is_a_case_or_refused(values):
    try:
        case = wire.parse_case(json.dumps(values), DEFAULTS)
    except wire.BadCase:
        return
    assert case.id == values.get("id")
    json.dumps(wire.case_dict(case))


@given(st.binary() | st.text())
def test_any_line_is_a_case_or_refused(line):
    with pytest.raises(wire.BadCase):
        wire.parse_case(line, DEFAULTS)
