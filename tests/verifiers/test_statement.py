"""What a free text can be taken to state, and all that it cannot."""

import pytest
from clocks import cpu_s
from free_texts import STATED, TASK, UNSTATED

from cosr_jax.verifiers.statement import stated_answer


@pytest.mark.parametrize(("text", "answer"), STATED)
def test_an_answer_that_is_stated_is_found_with_its_unit(text, answer):
    found = stated_answer(text, TASK)
    assert found is not None and found.written == answer
    assert found.written in text


@pytest.mark.parametrize("text", UNSTATED)
def test_when_in_doubt_there_is_no_answer(text):
    found = stated_answer(text, TASK)
    if found is not None:  # another value is stated, wholly
        assert found.written in ("12.5", "112")


def test_an_answer_that_the_limit_may_have_cut_is_none():
    assert stated_answer("The answer is 12", TASK, "stop") is not None
    assert stated_answer("The answer is 12", TASK, "length") is None


@pytest.mark.parametrize(
    "text",
    [
        "40 cups fit on a shelf.",
        "Ann says that 40 cups fit on a shelf",
        "There are 40 cups.",  # a number of the task, without a word that it is the answer
        "40",
        "So it has 40 cups.",
    ],
)
def test_what_the_task_says_is_no_answer(text):
    assert stated_answer(text, TASK) is None


def test_a_sentence_of_the_task_is_no_answer_even_if_it_speaks_of_one():
    task = "Bob writes: The answer is 12. Is Bob right, or what is 5 + 8?"
    assert stated_answer("The answer is 12", "What is 5 + 7?") is not None
    assert stated_answer("The answer is 12", task) is None


@pytest.mark.parametrize(
    ("quote", "occurrence", "is_it"),
    [
        ("12", 2, True),
        ("12 cups", 1, True),
        ("12", 1, False),
        ("12", 3, False),
        ("12", 0, False),
        ("12", -1, False),
        ("2 cups", 1, False),
        ("1", 2, False),
        ("7", 1, False),
        ("", 1, False),
        ("13", 1, False),
        ("12 cups.", 1, False),  # more than the sentence
    ],
)
def test_a_quotation_has_to_be_of_the_place_itself(quote, occurrence, is_it):
    found = stated_answer("5 + 7 = 12. So it has 12 cups.", TASK)
    assert found.is_pointed_at(quote, occurrence) is is_it


@pytest.mark.parametrize(
    "text",
    [
        "= " * 2000,
        "a " * 2000,
        "1 + " * 1000,
        "so " * 1300,
        "The answer to " + "a " * 1900,
        "a.b" * 1300,
        "So " + "9 " * 140 + "= x",
        "12 " + "a " * 140,
        "\n" * 4000,
        "-" * 4000,
        "," * 300,
        "1,111" * 800,
    ],
)
def test_no_text_takes_long(text):
    assert cpu_s(stated_answer, text, text) < 0.5
    assert cpu_s(stated_answer, text, TASK) < 0.5
