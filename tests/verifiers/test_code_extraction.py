"""One golden corpus for what counts as the student's program, and properties of any text."""

import json
from pathlib import Path

import pytest
from clocks import cpu_s
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.verifiers.code_extraction import CodeExtraction, extract_code
from cosr_jax.verifiers.extraction import final_text

GOLDEN = Path(__file__).parent / "corpus" / "extraction_golden.jsonl"
ROWS = map(json.loads, GOLDEN.read_text().splitlines())
CASES = [row for row in ROWS if row["extractor"] == "code"]
PROGRAM = "def f(x):\n    return x\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][:40]))
def test_golden_corpus(case):
    found = extract_code(case["text"], case["entry_point"], case["finish_reason"])
    assert found == CodeExtraction(case["code"], case["category"])


def test_the_corpus_is_as_large_as_promised():
    assert len(CASES) >= 120
    assert {case["category"] for case in CASES} == {"no_code", "truncated", ""}


PIECES = st.sampled_from(
    (
        *("```", "```python", "```bash", "~~~", "````", "\n", "\n", "\n", "    ", PROGRAM),
        *(PROGRAM, "f = 3\n", "print(1)\n", "Some words here.\n", '"""', "'", "#", "> ", "- "),
        *("<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "\ufeff", "\r\n", "def f"),
        *("<|channel|>final<|message|>", "<|end|>", "(", ")", "\\", ":", "input()", "\t"),
    )
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=30).map("".join))
NAMES = st.sampled_from(["f", "g", "", None, "Solution().f", "x.y", "(", "f\n", "\\"])


@settings(max_examples=300)
@given(TEXTS, NAMES, st.sampled_from(["stop", "length"]))
def test_a_program_is_a_stretch_of_the_final_text_or_there_is_none(text, name, finish_reason):
    found = extract_code(text, name, finish_reason)
    assert found.category in ("", "no_code", "truncated")
    assert bool(found.category) != bool(found.code.strip())
    if finish_reason == "stop":
        assert found.category != "truncated"
    lines = [line.lstrip("> \t") for line in final_text(text).split("\n")]
    for line in found.code.split("\n"):  # margins of lists and quotations may go, nothing else
        assert any(line.lstrip("> \t") in whole for whole in lines)


@given(st.lists(PIECES, max_size=20).map("".join))
def test_reasoning_never_changes_the_program(text):
    draft = "<think>\n```python\ndef f(x):\n    return 0\n```\n</think>"
    assert extract_code(draft + text, "f") == extract_code("</think>" + text, "f")


@given(st.text(max_size=200).filter(lambda text: "```" not in text and "<" not in text))
def test_whatever_stands_before_a_closed_block_of_its_own_line_the_block_is_found(text):
    found = extract_code(f"{text}\n\n```python\n{PROGRAM}```", "f")
    assert found.code == PROGRAM


@pytest.mark.parametrize(
    "piece",
    (
        *(
            "```\n",
            "```python\n",
            "`",
            "~~~\n",
            "'''",
            '\\"""',
            "f=",
            "<answer>",
            "a b\n",
            "x = 1\n",
        ),
        *(
            " ",
            "\n",
            "f,",
            "    f=1\n",
            "> ",
            "1. ```",
            "```a```\n",
            "#",
            "if x:\n",
            "- ",
            "'<answer>",
        ),
        *("```python\n'''\n", "f=(\n", " if a:\n  f = 1\n", "import (", "f(", "from x import "),
    ),
)
@pytest.mark.parametrize("name", ["f", None])
def test_work_is_linear(piece, name):
    for start in ("", "```python\n"):
        text = start + piece * (100_000 // len(piece))
        assert cpu_s(extract_code, text, name) < 2.0  # quadratic work takes tens of seconds
