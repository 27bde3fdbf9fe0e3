"""Laws of comparing answers; ``test_math_corpus`` has the cases."""

from fractions import Fraction

import pytest
from clocks import cpu_s
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.verifiers.math_answer import answers_agree, restates, symbolic_refusal
from cosr_jax.verifiers.symbolic import Unreadable, symbolically_equal
from cosr_jax.verifiers.units import canonical_unit

NEEDS_ALGEBRA = [
    (r"2\sqrt{2}", r"\sqrt{8}", True),
    (r"\sqrt{16}", "4", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\{\sqrt{8}, 1\}", r"\{1, 2\sqrt{2}\}", True),
    (r"[\sqrt{8}, 3)", r"[2\sqrt{2}, 3)", True),
    ("2.828", r"\sqrt{8}", False),
    ("x+1", "y+1", False),
]


@pytest.mark.parametrize(("answer", "gold", "agree"), NEEDS_ALGEBRA)
def test_what_needs_algebra_stays_open_without_it(answer, gold, agree):
    assert answers_agree(answer, gold) is None
    assert answers_agree(answer, gold, symbolically_equal) is agree


def test_an_unreadable_gold_is_no_judgement():
    with pytest.raises(Unreadable):
        symbolically_equal("x", "x +")


@pytest.mark.parametrize(
    ("prompt", "answer", "gold", "expected"),
    [
        ("What is 84 / 7?", "84/7", "12", True),
        ("What is 84 \u00f7 7?", r"\frac{84}{7}", "12", True),
        ("Simplify $\\frac{6}{8}$.", "6/8", "3/4", True),
        (r"Simplify \sqrt{8}.", r"\sqrt{8}", r"2\sqrt{2}", True),
        ("Write 3/4 as a decimal.", "3/4", "0.75", True),
        ("Which is larger, 3/4 or 2/3?", r"\frac{3}{4}", "3/4", False),
        ("What is 12/34?", "2/3", "6/17", False),
        ("What is 84 / 7?", "12", "12", False),
        ("What is 5 + 0?", "5", "5", False),
        ("What is -5 + 0?", "-5", "-5", False),
        ("Sort [-1, 3/4].", "[-1, 3/4]", "-1, 3/4", False),
        ("What is 20 - 1?", "20-1", "19", True),
    ],
)
def test_a_copied_calculation_is_no_answer(prompt, answer, gold, expected):
    assert restates(prompt, answer, gold) is expected


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("centimetres", "cm"),
        ("cm", "cm"),
        ("cubic feet", "ft^3"),
        ("m^{2}", "m^2"),
        ("miles per hour", "mi/h"),
        ("apples", "apple"),
        ("MS", None),
        ("x", None),
        ("million", None),
        ("", None),
        ("cm m", None),
    ],
)
def test_units(text, unit):
    assert canonical_unit(text) == unit


RATIONALS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999)


@given(RATIONALS, RATIONALS)
def test_fractions_agree_as_numbers_do(a, b):
    for written in (str(a), rf"\frac{{{a.numerator}}}{{{a.denominator}}}", f"{a} cm"):
        assert answers_agree(written, str(b)) is (a == b)
        assert answers_agree(written, str(a)) is True


@given(st.decimals(-(10**9), 10**9, places=4), st.integers(-1, 1))
def test_decimals_agree_to_the_last_digit(value, shift):
    exact = Fraction(value)
    other = exact + Fraction(shift, 10**4)
    assert answers_agree(f"{value:,f}", f"{other.numerator}/{other.denominator}") is (shift == 0)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=8), st.randoms())
def test_order_counts_in_lists_and_not_in_sets(numbers, random):
    shuffled = random.sample(numbers, len(numbers))
    a, b = (", ".join(map(str, values)) for values in (shuffled, numbers))
    assert answers_agree(a, b) is (shuffled == numbers)
    assert answers_agree(rf"\{{{a}\}}", rf"\{{{b}\}}") is True


PIECES = st.sampled_from(
    (
        *("1", "12", ",", ".", "/", "-", "+", "^", "{", "}", "(", ")", "[", "]", r"\frac", "x"),
        *(r"\sqrt", r"\{", r"\}", "=", "!", "%", " ", r"\text{cm}", "and", "'", "__", "**", "\n"),
    )
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=20).map("".join))


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_any_two_texts_are_decided_or_left_open(a, b):
    assert answers_agree(a, b) in (True, False, None)
    if a.strip():
        # Only a text of nothing but marks is no answer even to itself.
        assert answers_agree(a, a) in (True, False)


@given(TEXTS)
def test_refused_characters_never_pass(text):
    for bad in ("'", '"', "__class__", "x.__y", ".real", ";", "@", "`", "\\input"):
        assert symbolic_refusal(text + bad + text)


@pytest.mark.parametrize(
    "piece", ["1,", "1 ", "(", "((1)", r"\frac{1}", "1/", "=", "x=", "!", "^2"]
)
def test_bounded_time(piece):
    text = (piece * 1000)[:1000]
    assert cpu_s(answers_agree, text, "5") < 1.0
    assert cpu_s(answers_agree, "5", text) < 1.0
    assert cpu_s(answers_agree, text, text[:-2] + "7") < 1.0
