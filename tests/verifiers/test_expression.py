"""The grammar of expressions: exact arithmetic, bounded cost, and nothing but Unreadable raised."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.verifiers.cost import refusal
from cosr_jax.verifiers.expression import MAX_TOKENS, Node, Unreadable, parse, rational, variables
from cosr_jax.verifiers.math_answer import answers_agree

NUMBERS = st.integers(1, 99).map(lambda n: (str(n), Fraction(n)))


def _combined(pairs):
    def binary(mark, apply):
        return st.tuples(pairs, pairs).map(
            lambda ab: (mark.format(ab[0][0], ab[1][0]), apply(ab[0][1], ab[1][1]))
        )

    return st.one_of(
        binary("({}+{})", lambda a, b: a + b),
        binary("({} - {})", lambda a, b: a - b),
        binary(r"{} \cdot {}", lambda a, b: a * b),
        binary("({})({})", lambda a, b: a * b),
        pairs.filter(lambda a: a[1]).map(lambda a: (rf"\frac{{1}}{{{a[0]}}}", 1 / a[1])),
        pairs.map(
            lambda a: (
                f"|{a[0]}|",
                abs(a[1]),
            )
        ),
        st.tuples(pairs, st.integers(0, 3))
        .filter(lambda a: a[0][1])
        .map(lambda a: (f"({a[0][0]})^{{{a[1]}}}", a[0][1] ** a[1])),
    )


@given(st.recursive(NUMBERS, _combined, max_leaves=8))
def test_rational_arithmetic_is_exact(case):
    text, value = case
    if text.count("|") > 2:
        return  # nested bars have no one reading
    tree = parse(text)
    if not refusal(tree):
        assert rational(tree) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2/2", Fraction(1, 4)),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("(-2)^2", 4),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"\frac12 3", Fraction(3, 2)),
        ("50%", Fraction(1, 2)),
        ("3!", 6),
        (r"\binom{4}{2}", 6),
        (r"2 \cdot -3", -6),
        ("2^{-1}", Fraction(1, 2)),
        ("|3-5|", 2),
    ],
)
def test_conventions(text, value):
    assert rational(parse(text)) == value


@pytest.mark.parametrize("text", ["1/0", "0^0", "0^{-1}", r"\frac{1}{2-2}"])
def test_what_is_undefined_has_no_value(text):
    with pytest.raises(Unreadable):
        rational(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        *("", "+", "2 5", "{2}5", "2{5}", "(", ")", "x)", "[1)", "__import__", "a.b", "x'", '"5"'),
        *(
            "hello",
            r"\input{x}",
            "1e5",
            "3!!",
            "a=b",
            "1..2",
            "x_",
            "^2",
            r"\frac{1}",
            r"\sqrt",
            "|x",
        ),
        *("1 if x else 2", "lambda: 0", "f(x", "x;y", "@", "\\", "\0", "1+" * MAX_TOKENS + "1"),
        *("(" * 100 + "1" + ")" * 100, "9" * 500),
    ],
)
def test_what_is_no_expression_is_unreadable(text):
    with pytest.raises(Unreadable):
        parse(text)


@given(st.text(alphabet="0123456789xyei+-*/^(){}[]|!_%.\\ fracsqrtlogsinpi\u00b0", max_size=40))
def test_any_text_is_read_or_unreadable_and_its_cost_is_known(text):
    try:
        tree = parse(text)
    except Unreadable:
        return
    assert isinstance(tree, Node)
    try:
        reason = refusal(tree)
    except Unreadable:  # an exponent such as 1/0
        return
    if not reason and not variables(tree):
        try:
            value = rational(tree)
        except Unreadable:
            return
        if value is not None:
            assert max(abs(value.numerator), value.denominator) < 10**6100


@pytest.mark.parametrize(
    "text",
    [
        *("9^9^9^9", "2^{99999999}", "99999999!", r"\binom{9999}{5}", "(x+1)^{9999}", "10^{4000}"),
        *(
            "((2^{99})^{99})^{99}",
            "2^{1/0.0000000001}",
            r"\exp(10^9)",
            "(a+b+c+d)^{90}",
            "x^{20000}",
        ),
        *("(3!)!!".replace("!!", "!^{900}"), "1000!^{2}", "2^{(10^{5})}", "(2^{1000})!"),
    ],
)
def test_what_is_expensive_is_refused_without_being_computed(text):
    assert refusal(parse(text))


ENDS = st.fractions(-50, 50, max_denominator=9)


@given(ENDS, ENDS, st.booleans(), st.booleans())
def test_inequalities_are_intervals(a, b, low_closed, high_closed):
    low, high = sorted((a, b))
    interval = f"{'[' if low_closed else '('}{low}, {high}{']' if high_closed else ')'}"
    relation = rf"{low} {'<=' if low_closed else '<'} x {'<=' if high_closed else '<'} {high}"
    assert answers_agree(relation, interval) is True
    assert answers_agree(interval, relation) is True
    if low < high:
        other = f"{'(' if low_closed else '['}{interval[1:]}"
        assert answers_agree(other, relation) is False
        middle = (low + high) / 2
        union = rf"{interval[:1]}{low}, {middle}] \cup ({middle}, {high}{interval[-1]}"
        assert answers_agree(union, interval) is True
        assert answers_agree(union.replace(r"] \cup", r") \cup"), interval) is False


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_ratios_agree_as_proportions_unless_they_look_like_times(a, b, k):
    one, other = f"{a}:{b}", f"{k * a} : {k * b}"
    looks_like_a_time = [
        int(text.split(":")[0]) <= 24 and len(text.split(":")[1].strip()) == 2
        for text in (one, other)
    ]
    if not any(looks_like_a_time):
        assert answers_agree(one, other) is True
        assert answers_agree(one, f"{k * a + 1}:{k * b}") is not True
