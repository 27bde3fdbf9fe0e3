"""One golden corpus for what counts as the final answer, and properties of any text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.verifiers.extraction import METHODS, Extraction, extract_answer, final_text

FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"

# (text, answer, method); an answer of None is no answer.
CORPUS = [
    # The last box counts, closed and not empty.
    (r"\boxed{19}", "19", "boxed"),
    (r"So 12 + 7 = \boxed{19}.", "19", "boxed"),
    (r"\boxed{3} no, \boxed{4}", "4", "boxed"),
    (r"\boxed{ 42 }", "42", "boxed"),
    (r"\boxed {42}", "42", "boxed"),
    (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}", "boxed"),
    (r"\boxed{\sqrt{\frac{a}{b}}}", r"\sqrt{\frac{a}{b}}", "boxed"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
    (r"\boxed{\boxed{4}}", "4", "boxed"),
    (r"\boxed{x = \boxed{4}}", r"x = \boxed{4}", "boxed"),
    ("\\boxed{1,\n2}", "1,\n2", "boxed"),
    (r"\boxed{4} (the answer is 5, #### 6)", "4", "boxed"),
    (r"<answer>\boxed{7}</answer>", "7", "boxed"),
    (r"\boxed{}", None, ""),
    (r"\boxed{   }", None, ""),
    (r"\boxed{19", None, ""),
    (r"\boxed{3} so \boxed{4", None, ""),
    (r"\boxed{3} so \boxed{}", None, ""),
    (r"The answer is 4. \boxed{", None, ""),
    (r"<answer>4</answer> \boxed{\frac{1}{2}", None, ""),
    (r"\boxed{4\}", None, ""),
    # Alternatives are no answer.
    (r"\boxed{3 or 4}", None, ""),
    (r"\boxed{3 \text{ or } 4}", None, ""),
    (r"\boxed{x=3\lor x=4}", None, ""),
    (r"\boxed{either 3, 4}", None, ""),
    (r"\boxed{maybe 4}", None, ""),
    ("<answer>3 or 4</answer>", None, ""),
    ("The answer is 3 or 4.", None, ""),
    ("The answer is 3, or perhaps 4", None, ""),
    ("It could be 3 or 4", None, ""),
    ("#### 3 or 4", None, ""),
    (r"\boxed{\text{orange}}", r"\text{orange}", "boxed"),
    # Tags and hashes.
    ("<answer>19</answer>", "19", "answer_tag"),
    ("<answer>3</answer> <answer> 4 </answer>", "4", "answer_tag"),
    ("<answer>4</answer> <answer>5", None, ""),
    ("<answer></answer>", None, ""),
    ("work\n#### 42", "42", "hashes"),
    ("work\n#### 1,234\n", "1,234", "hashes"),
    ("#### 3\n#### -4", "-4", "hashes"),
    ("#### $18", "$18", "hashes"),
    ("#### Step one done\nand 7 more", "7", "number"),
    # Phrases.
    ("The answer is 19.", "19", "phrase"),
    ("the final answer is: 19", "19", "phrase"),
    ("**Answer:** 42", "42", "phrase"),
    ("Answer: **42**.", "42", "phrase"),
    (r"The answer is $\frac{1}{2}$. I hope it is right.", r"\frac{1}{2}", "phrase"),
    (r"The answer is \(x+1\).", "x+1", "phrase"),
    ("The answer is 3.5", "3.5", "phrase"),
    ("The answer is 5 cm.", "5 cm", "phrase"),
    ("The answer is 19 because 12 + 7 is 19", "19", "phrase"),
    ("The answer is 3. No: the answer is 4.", "4", "phrase"),
    ("The answer is 3, wait, the answer is 4.", "4", "phrase"),
    ("The answer is 3 or the answer is 4.", None, ""),
    ("The answer is 1, 2, 3.", "1, 2, 3", "phrase"),
    ("The answer is Monday.", "Monday", "phrase"),
    ("The answer is the sum of 3 and 4, 7", "7", "number"),
    # One bare value.
    ("19", "19", "bare"),
    (" 19.\n", "19", "bare"),
    ("**19**", "19", "bare"),
    ("-3.5", "-3.5", "bare"),
    ("56%", "56%", "bare"),
    ("x = 5", "x = 5", "bare"),
    ("1, 2, 3", "1, 2, 3", "bare"),
    ("[1, 2, 3]", "[1, 2, 3]", "bare"),
    (r"$\frac{3}{4}$", r"\frac{3}{4}", "bare"),
    ("olleh", "olleh", "bare"),
    # The last number.
    ("12 + 7 = 19", "19", "number"),
    ("I get 10-5 here", "5", "number"),
    ("it goes down to -5 then", "-5", "number"),
    ("there are 1,234.5 of them", "1,234.5", "number"),
    ("which gives 3/4 as wanted", "3/4", "number"),
    ("that is 56% of it", "56%", "number"),
    (r"we find $\frac{3}{4}$ here", r"\frac{3}{4}", "number"),
    ("use x2 then", None, ""),
    # Nothing.
    ("", None, ""),
    ("   \n", None, ""),
    ("I do not know the answer", None, ""),
    # Only the final answer counts.
    ("<think>4</think>", None, ""),
    (r"<think>\boxed{4}</think>", None, ""),
    (r"<think>\boxed{4}</think> \boxed{5}", "5", "boxed"),
    (r"<think>\boxed{4}", None, ""),
    (r"reasoning \boxed{4} </think> \boxed{5}", "5", "boxed"),
    (r"\boxed{4} <think> wait", None, ""),
    (ANALYSIS + r"\boxed{4}<|end|>", None, ""),
    (ANALYSIS + "4<|end|><|start|>assistant" + FINAL + "5<|return|>", "5", "bare"),
    (FINAL + "4<|end|>" + ANALYSIS + "5", "4", "bare"),
    (FINAL + "4<|end|><|start|>assistant" + FINAL + "5", "5", "bare"),
    ("<|channel|>final <|constrain|>json<|message|>6<|return|>", "6", "bare"),
    # End-of-text tokens, BOM, CRLF.
    ("19<|im_end|>", "19", "bare"),
    ("19<|im_end|>\n<|endoftext|>", "19", "bare"),
    ("19</s>", "19", "bare"),
    ("\ufeff19", "19", "bare"),
    ("work\r\n#### 42\r\n", "42", "hashes"),
]


@pytest.mark.parametrize(("text", "answer", "method"), CORPUS)
def test_golden_corpus(text, answer, method):
    expected = Extraction("", "", "no_answer") if answer is None else Extraction(answer, method)
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{19}", "19"),
        ("<answer>19</answer>", "19"),
        ("The answer is 19. Next", "19"),
        ("The answer is 19\n", "19"),
        ("The answer is 19", None),  # could have become 190
        ("The answer is 19.", None),  # could have become 19.5
        ("19", None),
        ("#### 19", None),
        ("12 + 7 = 19", None),
        ("12 + 7 = 19 and", "19"),
        (r"\boxed{19", None),
        ("", None),
        ("<think> 4", None),
    ],
)
def test_a_value_that_the_length_limit_may_have_cut_does_not_count(text, answer):
    found = extract_answer(text, "length")
    assert (found.answer or None) == answer
    assert found.category == ("truncated" if answer is None else "")


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
    ),
)
def test_work_is_linear(piece):
    text = piece * (100_000 // len(piece))
    for variant in (text, "x " + text + "?", "answer is " + text):
        start = time.process_time()
        extract_answer(variant)
        assert time.process_time() - start < 3.0  # quadratic work takes tens of seconds


@settings(max_examples=30)
@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{}.", "I get {}.", "The answer is {}."])
)
def test_integers_are_found_whole(number, frame):
    assert extract_answer(frame.format(number)).answer == str(number)
