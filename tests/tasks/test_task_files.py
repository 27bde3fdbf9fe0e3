import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.tasks.files import parse_fields, read_tasks, write_tasks
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import CodeChecks, ProofChecks, Task, UserError

GOOD = {
    "id": "a1",
    "domain": "math",
    "prompt": "What is 1 + 1?",
    "answer": "2",
    "skill": "addition",
    "difficulty": 0.25,
}
CODE = {
    "id": "c1",
    "domain": "code",
    "prompt": "Write f.",
    "entry_point": "f",
    "tests": ["assert f(1) == 2"],
    "skill": "functions",
    "difficulty": 0.5,
}
text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


def bad_line(path, record, **changes):
    """The message about a file whose second line is ``record`` with ``changes``."""
    line = record if isinstance(record, str) else json.dumps({**record, **changes})
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_tasks(path)
    assert f"{path}:2:" in error.value.what
    return str(error.value)


def test_suite_tasks_survive_the_round_trip(tmp_path):
    suite = ProceduralSuite(domains=("math", "code"))
    tasks = [suite.draw(cell, 0, "test") for cell in suite.cells()]
    path = tmp_path / "tasks.jsonl"
    write_tasks(path, tasks)
    expected = [
        dataclasses.replace(
            t, solution=t.solution if t.domain == "code" else "", source="tasks.jsonl"
        )
        for t in tasks
    ]
    assert list(read_tasks(path)) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.jsonl"]


@given(key=text, prompt=text, answer=text, skill=text, difficulty=st.floats(0, 1))
def test_any_text_survives_the_round_trip(tmp_path_factory, key, prompt, answer, skill, difficulty):
    path = tmp_path_factory.mktemp("files") / "t.jsonl"
    task = Task("math", skill, difficulty, prompt, answer, key, source="t.jsonl")
    write_tasks(path, [task])
    assert read_tasks(path) == (task,)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("old")

    def tasks():
        yield ProceduralSuite().draw("units/1", 0, "train")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tasks(path, tasks())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.jsonl"]


@pytest.mark.parametrize(
    ("domain", "checks"),
    [("proof", ProofChecks("property", "x")), ("code", CodeChecks(io=(("1", "2"),)))],
)
def test_tasks_without_a_place_in_the_format_are_refused(tmp_path, domain, checks):
    math = ProceduralSuite().draw("units/1", 0, "train")
    with pytest.raises(ValueError, match=f"units.*{domain}"):
        write_tasks(
            tmp_path / "t.jsonl", [math, dataclasses.replace(math, domain=domain, checks=checks)]
        )
    assert not list(tmp_path.iterdir())


def test_fields_are_mapped_and_further_ones_ignored(tmp_path):
    record = {"n": 7, "question": "What is 1 + 1?", "target": 2, "type": "math", "note": None}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**record, "skill": "addition", "difficulty": 1}) + "\n\n")
    fields = parse_fields(("id=n", "prompt=question", "answer = target", "domain=type"))
    (task,) = read_tasks(path, fields)
    assert (task.key, task.prompt, task.answer) == ("7", "What is 1 + 1?", "2")
    assert (task.skill, task.level, task.source) == ("addition", 5, "t.jsonl")


@pytest.mark.parametrize(
    "fields", [("question",), ("prompt=",), ("promt=question",), ("prompt=a", "prompt=b")]
)
def test_bad_field_maps_are_refused(fields):
    with pytest.raises(UserError, match=r"config\.eval\.fields"):
        parse_fields(fields)


@pytest.mark.parametrize("field", list(GOOD))
def test_a_missing_field_is_named_with_file_and_line(tmp_path, field):
    record = {k: v for k, v in GOOD.items() if k != field}
    assert f"field {field!r} is missing" in bad_line(tmp_path / "t.jsonl", record)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "a1"),
        ("id", ""),
        ("id", None),
        ("id", True),
        ("domain", "maths"),
        ("domain", ["math"]),
        ("prompt", "  "),
        ("prompt", 3),
        ("answer", ""),
        ("answer", True),
        ("answer", ["2"]),
        ("answer", float("nan")),
        ("answer", float("inf")),
        ("skill", None),
        ("difficulty", 1.01),
        ("difficulty", -0.1),
        ("difficulty", "0.5"),
        ("difficulty", False),
        ("difficulty", float("nan")),
    ],
)
def test_a_bad_value_is_named_with_its_field(tmp_path, field, value):
    changes = {"id": "a2", field: value}
    message = bad_line(tmp_path / "t.jsonl", GOOD, **changes)
    assert f"field {field!r}" in message and repr(value) in message


@pytest.mark.parametrize("line", ["{", "not json", "[1]", '"text"', "1e999", "[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    bad_line(tmp_path / "t.jsonl", line)


def test_a_mapped_field_is_named_as_in_the_file(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**GOOD, "question": 5}))
    with pytest.raises(UserError, match="field 'question'"):
        read_tasks(path, {"prompt": "question"})


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (["assert f(1) == 2", "assert f(2) == 3"], ("assert f(1) == 2", "assert f(2) == 3")),
        ("x = 1\nassert f(x) == 2", ("x = 1\nassert f(x) == 2",)),
    ],
)
def test_tests_are_a_list_or_one_text(tmp_path, tests, expected):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**CODE, "tests": tests}))
    (task,) = read_tasks(path)
    assert task.checks == CodeChecks("f", expected)
    assert (task.domain, task.answer, task.solution, task.cell) == ("code", "", "", "functions/3")


def test_the_reference_becomes_an_answer(tmp_path):
    path = tmp_path / "t.jsonl"
    source = "def f(x):\n    return x + 1\n"
    path.write_text(json.dumps({**CODE, "canonical": source, "reference_solution": 3}))
    (task,) = read_tasks(path, {"reference_solution": "canonical"})
    assert task.solution == f"```python\n{source}\n```"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("entry_point", ""),
        ("entry_point", None),
        ("tests", []),
        ("tests", [1]),
        ("tests", " "),
        ("reference_solution", ""),
        ("reference_solution", ["x"]),
    ],
)
def test_bad_values_of_code_problems_are_named(tmp_path, field, value):
    assert f"field {field!r}" in bad_line(tmp_path / "t.jsonl", CODE, **{field: value})


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b'{"id": "\xff"}'])
def test_unusable_files_are_named(tmp_path, content):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.jsonl: "):
        read_tasks(path)


def test_a_folder_is_no_task_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_tasks(tmp_path)
