"""What holds for every text: nothing raises, nothing is invented, nothing whole is lost."""

import json
import re

import pytest
from clocks import cpu_s
from fake_judge import judge
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cosr_jax.curator.parsing import MAX_CHARS, Response, parse
from cosr_jax.curator.schemas import SCHEMAS, Context

CONTEXT = Context(
    known_task_ids=("t1", "t2", "t3"),
    known_skills=("addition", "carrying"),
    known_strategies=("raise", "lower"),
    limits={"learning_rate_scale": (0.1, 2.0), "num_tasks": (1, 64)},
)
KEYS = {"analysis": "weaknesses", "tasks": "tasks"}

#: Text that tempts a careless reader: quotes, brackets, marks, escapes, whole values.
TEMPTING = st.sampled_from(
    [
        *"\"'`{}[],:\\/#\n \t\u201c\u2019\ufeff<>|",
        *("```", "\\n", "//", "/*", "*/", "</think>", "<think>", "NaN", "True", "null", "0.5"),
        *("<|channel|>final<|message|>", "<|end|>", "assistantfinal", '"weaknesses": [', "\\u00e9"),
        *(
            '{"weaknesses": []}',
            '{"tasks": []}',
            "{'strategy': 'raise'}",
            '"}]}',
            '\\"',
            "\U0001f600",
        ),
    ]
)
#: They end an answer or begin it, wherever they stand outside a string.
MARKS = ("<think>", "</think>", "<|channel|>final<|message|>", "<|end|>", "assistantfinal")
TEXT = st.lists(st.one_of(TEMPTING, st.text(max_size=5)), max_size=8).map("".join)
UNICODE = TEXT.filter(lambda text: not re.search("[\ud800-\udfff]", text))
PLAIN = st.text(alphabet="abc xyz", max_size=12)


def weaknesses(text):
    return st.fixed_dictionaries(
        {
            "skill": st.sampled_from(["addition", "carrying"]),
            "kind": st.sampled_from(["format", "logic"]),
            "evidence_task_ids": st.lists(
                st.sampled_from(["t1", "t2", "t3"]), min_size=1, max_size=3
            ),
            "severity": st.sampled_from([0, 1, 0.25, 0.123456789, 1e-3]),
            "rationale": text,
        }
    )


def plans():
    return st.fixed_dictionaries(
        {
            "strategy": st.sampled_from(["raise", "lower"]),
            "focus": st.lists(st.sampled_from(["addition", "carrying"]), max_size=3),
            "difficulty": st.floats(0, 1),
            "learning_rate_scale": st.floats(0.1, 2.0),
            "num_tasks": st.integers(1, 64),
        }
    )


def tasks(text):
    def task(number, words):
        return {
            "prompt": f"{number}: {words}",
            "domain": "math",
            "answer": str(number),
            "reference_solution": f"{words} \\boxed{{{number}}}",
            "difficulty": 0.5,
            "skill": "addition",
        }

    numbers = st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True)
    return st.tuples(numbers, text).map(lambda drawn: [task(n, drawn[1]) for n in drawn[0]])


def read(schema, content, **kwargs):
    return parse(schema, Response(content, **kwargs), CONTEXT, judge)


ANYTHING = st.one_of(
    st.text(max_size=60),
    st.lists(TEMPTING, max_size=30).map("".join),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["weaknesses", "tasks", "strategy", "a"]), inner, max_size=3
            ),
        ),
        max_leaves=8,
    ).map(json.dumps),
)


@given(st.sampled_from(SCHEMAS), ANYTHING, st.sampled_from(["stop", "length", None]))
@example("plan", '{"num_tasks": ' + 5000 * "1" + "}", "stop")
@example("tasks", "[" * 100_000, "stop")
def test_no_text_raises(schema, content, finish_reason):
    result = read(schema, content, finish_reason=finish_reason)
    assert (result.value is None) == bool(result.error)


def written(items, schema, how):
    """A list of items written in several ways, and where each item ends in the text."""
    write = {
        "compact": lambda v: json.dumps(v, separators=(",", ":")),
        "pretty": lambda v: json.dumps(v, indent=2),
        "python": repr,
        "raw": lambda v: json.dumps(v, ensure_ascii=False),
    }[how.rpartition("-")[2]]
    text = f'{{"{KEYS[schema]}": ['
    if how.startswith("fenced"):
        text = "Here it is:\n```json\n" + text
    elif how.startswith("wrapped"):
        text = '{"result": ' + text
    ends = []
    for item in items:
        text += ("\n" if not ends else ",\n") + write(item)
        ends.append(len(text))
    return text + "\n]}" + ("}" if how.startswith("wrapped") else ""), ends


HOW = st.sampled_from(
    [
        f"{frame}-{how}"
        for frame in ("plain", "fenced", "wrapped")
        for how in ("compact", "pretty", "python", "raw")
    ]
)


@settings(max_examples=100)
@given(st.data(), st.lists(weaknesses(UNICODE), min_size=1, max_size=3), HOW)
def test_a_prefix_gives_its_whole_items_and_no_more(data, items, how):
    text, ends = written(items, "analysis", how)
    cut = data.draw(st.integers(0, len(text) - 1))
    whole = [item for item, end in zip(items, ends, strict=True) if end <= cut]
    result = read("analysis", text[:cut], finish_reason="length")
    assert (result.value or {"weaknesses": []})["weaknesses"] == whole
    assert (result.error == "") == bool(whole)


@settings(max_examples=100)
@given(st.data(), tasks(UNICODE), HOW)
def test_a_prefix_of_tasks_gives_whole_tasks(data, items, how):
    text, ends = written(items, "tasks", how)
    cut = data.draw(st.integers(0, len(text) - 1))
    result = read("tasks", text[:cut])
    kept = result.value["tasks"] if result.value else []
    whole = [item for item, end in zip(items, ends, strict=True) if end <= cut]
    assert kept == [item for item in whole if item in kept]
    assert len(kept) + result.dropped >= len(whole)


@given(plans(), st.data())
def test_no_prefix_of_a_plan_is_a_plan(plan, data):
    text = json.dumps(plan)
    cut = data.draw(st.integers(0, len(text) - 1))
    assert read("plan", text[:cut]).value is None
    assert read("plan", text).value == plan


def _comments(text, pretty):
    return pretty.replace("{\n", '{ // a comment: {"x", [1]}\n', 1).replace("\n]", "/* , */\n]")


#: Repairs that may be combined: each takes a text and returns one with the same value.
REPAIRS = {
    "bom": lambda text: "\ufeff" + text,
    "fence": lambda text: "```json\n" + text + "\n```",
    "prose": lambda text: "Here's the JSON (see [1] and {below}):\n" + text + "\nThat's {it}.",
    "trailing comma": lambda text: re.sub(r"(\s*[}\]]\s*)\Z", r",\1", text),
    "comment": lambda text: re.sub(r"\A(\s*[{\[])", r"\1 // don't [\n/* {'} */ # x\n", text),
    "harmony": lambda text: (
        f"<|channel|>analysis<|message|>Hm {{<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{text}<|return|>"
    ),
    "think": lambda text: f"<think>[maybe {{'strategy': 1, </think>\n{text}",
    "blanks": lambda text: f"\n\u00a0 {text} \r\n",
}


@settings(max_examples=100)
@given(
    st.one_of(
        st.lists(weaknesses(UNICODE), max_size=3).map(lambda w: ("analysis", {"weaknesses": w})),
        plans().map(lambda plan: ("plan", plan)),
    ),
    st.sampled_from(["compact", "pretty", "python", "encoded", "wrapped", "raw newlines"]),
    st.lists(st.sampled_from(["trailing comma", "comment"]), unique=True),
    st.sampled_from(["", "bom", "fence", "prose", "harmony", "think", "blanks"]),
)
def test_repairs_keep_the_value(answer, writing, inner, outer):
    schema, value = answer
    text = {
        "compact": lambda: json.dumps(value, separators=(",", ":")),
        "pretty": lambda: json.dumps(value, indent=2, ensure_ascii=False),
        "python": lambda: repr(value),
        "encoded": lambda: json.dumps(value),
        "wrapped": lambda: json.dumps({"answer": value}),
        "raw newlines": lambda: json.dumps(value).replace("\\\\n", "\0").replace("\\n", "\n"),
    }[writing]().replace("\0", "\\\\n")
    for repair in inner:
        text = REPAIRS[repair](text)
    if writing == "encoded":
        assume("comment" not in inner)
        text = json.dumps(text)
    if outer:
        text = REPAIRS[outer](text)
    result = read(schema, text)
    assert result.value == value, (text, result)
    assert result.dropped == 0


@settings(max_examples=100)
@given(st.data(), st.lists(weaknesses(PLAIN), min_size=1, max_size=3))
def test_damage_brings_in_nothing_new(data, items):
    """Whatever is deleted, doubled or inserted: strings and numbers that come out stand in it."""
    text = json.dumps({"weaknesses": items})
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        to = data.draw(st.integers(at, min(len(text), at + 20)))
        text = text[:at] + data.draw(st.one_of(TEMPTING, st.just(text[at:to]))) + text[to:]
    result = read("analysis", text)
    numbers = {float(n) for n in re.findall(r"-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?", text)}
    for item in result.value["weaknesses"] if result.value else ():
        assert item["severity"] in numbers
        assume("\\" not in text)
        assert item["rationale"] in text
        assert all(f'"{i}"' in text or f"{i}" in text for i in item["evidence_task_ids"])


@settings(max_examples=100)
@given(st.data(), st.lists(weaknesses(PLAIN), min_size=3, max_size=5))
def test_items_before_the_damage_survive(data, items):
    text, ends = written(items, "analysis", "plain-compact")
    broken = data.draw(st.integers(1, len(items) - 1))
    at = data.draw(st.integers(ends[broken - 1] + 3, ends[broken] - 1))
    text = text[:at] + data.draw(TEMPTING.filter(lambda t: t not in MARKS)) + text[at:]
    result = read("analysis", text)
    assert result.value is not None, text
    assert result.value["weaknesses"][:broken] == items[:broken]


HARD = {
    "lists": "[",
    "objects": '{"a":',
    "items": '[{"a":1},',
    "strings": '["',
    "broken items": '{"tasks": [{x ',
    "broken lists": "[1 2 ",
    "mismatched": "[{]",
    "marks": "</think><|channel|>final",
    "comments": "<!-- ",
    "backslashes": '{"a": "\\',
    "lines": '\n{"a":x y',
}


@pytest.mark.slow
@pytest.mark.parametrize("unit", HARD.values(), ids=HARD)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_million_characters_take_seconds(schema, unit):
    assert cpu_s(read, schema, (unit * MAX_CHARS)[:MAX_CHARS]) < 15


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD)
def test_a_long_answer_takes_time_linear_in_its_length(unit):
    # Quadratic work would take minutes.
    assert cpu_s(read, "tasks", (unit * 60_000)[:60_000]) < 2.0
