"""One golden corpus for what counts as the final answer, and properties of any text."""

import json
from pathlib import Path

import pytest
from clocks import cpu_s
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.verifiers.extraction import METHODS, Extraction, extract_answer, final_text

FINAL = "<|channel|>final<|message|>"

GOLDEN = Path(__file__).parent / "corpus" / "extraction_golden.jsonl"
ROWS = map(json.loads, GOLDEN.read_text().splitlines())
CASES = [row for row in ROWS if row["extractor"] == "answer"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][:40]))
def test_golden_corpus(case):
    found = extract_answer(case["text"], case["finish_reason"])
    assert found == Extraction(case["answer"], case["method"], case["category"])


def test_the_corpus_covers_every_form_and_both_ways_to_fail():
    assert {case["method"] for case in CASES} == {*METHODS, ""}
    assert {case["category"] for case in CASES} == {"no_answer", "truncated", ""}


PIECES = st.sampled_from(
    (
        *(r"\boxed{", "}", "{", "\\", "<answer>", "</answer>", "####", "answer is ", "<think>"),
        *("</think>", "12", "-", ".", ",", " ", "\n", " or ", "$", r"\frac{1}{2}", "x = ", FINAL),
        *("<|end|>", "<|im_end|>", "**", "%", r"\(", r"\)", "\u2212", "\ufeff"),
    )
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=30).map("".join))


@given(TEXTS, st.sampled_from(["stop", "length"]))
def test_any_text_gives_either_an_answer_or_a_category(text, finish_reason):
    found = extract_answer(text, finish_reason)
    if found.category:
        assert (found.answer, found.method) == ("", "")
        assert found.category == ("truncated" if finish_reason == "length" else "no_answer")
    else:
        assert found.method in METHODS
        assert found.answer == found.answer.strip() != ""
        assert found.answer in final_text(text), "nothing is repaired or completed"


@given(TEXTS)
def test_boxing_the_answer_found_in_a_box_changes_nothing(text):
    found = extract_answer(text)
    if found.method == "boxed":
        boxed = extract_answer(rf"\boxed{{{found.answer}}}")
        # A box around one box and nothing else is one box: the inner answer is found.
        assert boxed == found or found.answer.startswith(r"\boxed")


@given(TEXTS)
def test_reasoning_never_changes_the_answer(text):
    draft = r"<think>the answer is 3, \boxed{4} #### 5</think>"
    assert extract_answer(draft + text) == extract_answer("</think>" + text)


@pytest.mark.parametrize(
    "piece",
    (
        *(r"\boxed{", r"\boxed{1}", " ", "\n", "answer is ", "answer: 1 ", "1,", "1 ", "1,111"),
        *("1/", "$", r"\(", "<think>", "<answer>", "<|im_end|>", "#### ", "<|channel|>final"),
        *(r"\frac{1}", "a", "-", ".", "*", "####1\n", "answer is 1 a a ", "x = ", FINAL),
        *(r"\boxed{1},", r"answer is \[", "answer is $$", "answer is 1, ", "1 and ", "'<think>'"),
    ),
)
def test_work_is_linear(piece):
    text = piece * (100_000 // len(piece))
    for variant in (text, "x " + text + "?", "answer is " + text):
        assert cpu_s(extract_answer, variant) < 2.0  # quadratic work takes tens of seconds


@settings(max_examples=30)
@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{}.", "I get {}.", "The answer is {}."])
)
def test_integers_are_found_whole(number, frame):
    assert extract_answer(frame.format(number)).answer == str(number)
