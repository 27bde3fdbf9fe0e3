import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.curator.curriculum import (
    expected_informative,
    informative_probability,
    informative_share,
    mixture,
    mixture_share,
    nearest_the_zone,
)
from cosr_jax.curator.mastery import Beta, CellMastery

scores = st.dictionaries(
    st.sampled_from([f"s{i}/{j}" for i in range(5) for j in range(1, 6)]),
    st.floats(0.0, 1e6, allow_subnormal=True),
    min_size=1,
)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_probability_counts_the_mixed_outcomes(p):
    outcomes = itertools.product((True, False), repeat=4)
    mixed = (o for o in outcomes if 0 < sum(o) < 4)
    expected = sum(math.prod(p if right else 1 - p for right in o) for o in mixed)
    assert informative_probability(p, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.5, 31.5), (20.0, 12.0), (900.0, 40.0)])
def test_expectation_agrees_with_sampling_the_posterior(a, b):
    rng = random.Random(0)
    draws = [informative_probability(rng.betavariate(a, b), 8) for _ in range(20_000)]
    assert expected_informative(Beta(a, b), 8) == pytest.approx(sum(draws) / len(draws), abs=0.01)


@given(st.floats(0.5, 1e4), st.floats(0.5, 1e4), st.integers(2, 64))
def test_expectation_is_a_probability_and_symmetric(a, b, group_size):
    value = expected_informative(Beta(a, b), group_size)
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(expected_informative(Beta(b, a), group_size))


def test_counted_groups_overrule_the_model():
    model = informative_share(CellMastery(samples=160, passed=80), 8)
    counted = informative_share(CellMastery(samples=160, passed=80, groups=20), 8)
    assert model > 0.95
    assert counted == pytest.approx(2 * model / 22)
    mixed = CellMastery(samples=160, passed=80, groups=20, informative_groups=5)
    assert informative_share(mixed, 8) == pytest.approx((2 * model + 5) / 22)


@given(scores, st.integers(1, 30))
def test_weights_are_a_distribution_over_few_of_the_cells(values, max_cells):
    weights = mixture(values, max_cells=max_cells)
    assert math.fsum(w for _, w in weights) == pytest.approx(1.0)
    assert all(w > 0.0 for _, w in weights)
    assert 1 <= len(weights) <= max_cells
    assert len({cell for cell, _ in weights}) == len(weights)
    ordered = [values[cell] for cell, _ in weights]
    assert ordered == sorted(ordered, reverse=True)
    dropped = [s for cell, s in values.items() if cell not in dict(weights)]
    assert all(s <= max(ordered) * 0.15 or s <= min(ordered) for s in dropped)


def test_weights_follow_the_scores_and_drop_the_tail():
    weights = mixture({"a/1": 0.1, "a/2": 0.6, "a/3": 0.2})
    assert [cell for cell, _ in weights] == ["a/2", "a/3", "a/1"]
    assert [w for _, w in weights] == pytest.approx([0.6 / 0.9, 0.2 / 0.9, 0.1 / 0.9])
    assert [cell for cell, _ in mixture({"a/1": 0.05, "a/2": 0.6})] == ["a/2"]
    assert mixture({"a/1": 0.0, "a/2": 0.0}) == (("a/1", 0.5), ("a/2", 0.5))


def test_share_of_a_mixture_is_the_weighted_mean():
    share = mixture_share((("a/1", 0.25), ("a/2", 0.75)), {"a/1": 0.4, "a/2": 0.8})
    assert share == pytest.approx(0.7)


@pytest.mark.parametrize("bad", [{}, {"a/1": -0.1}, {"a/1": math.nan}, {"a/1": math.inf}])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match=r"mixture needs|score of a/1"):
        mixture(bad)


def test_nearest_the_zone_looks_at_values_not_at_the_form():
    masteries = {
        "a/1": CellMastery(samples=32, passed=0, value_correct=32),
        "a/2": CellMastery(samples=32, passed=0, value_correct=14),
        "a/3": CellMastery(samples=32, passed=0, value_correct=0),
        "a/4": CellMastery(),
    }
    cells = ("a/3", "a/1", "a/2", "a/4")
    assert nearest_the_zone(masteries, cells, 8, count=2) == ("a/2", "a/4")
