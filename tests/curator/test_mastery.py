import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.curator.mastery import Beta, CellMastery, beta_cdf, beta_quantile
from cosr_jax.types import CellEvidence

shapes = st.floats(0.5, 2000.0)


@st.composite
def evidence(draw, max_samples=400):
    samples = draw(st.integers(0, max_samples))
    value = draw(st.integers(0, samples))
    groups = draw(st.integers(0, samples // 2))
    return CellEvidence(
        "addition/1",
        samples=samples,
        passed=draw(st.integers(0, value)),
        value_correct=value,
        formatted=draw(st.integers(0, samples)),
        groups=groups,
        informative_groups=draw(st.integers(0, groups)),
    )


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.0, 1.0))
def test_cdf_equals_the_binomial_tail(a, b, x):
    """I_x(a, b) = P(Binomial(a + b - 1, x) >= a), DLMF 8.17.5."""
    n = a + b - 1
    tail = math.fsum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert beta_cdf(x, a, b) == pytest.approx(tail, abs=1e-10)


@given(st.floats(0.001, 0.999))
def test_cdf_of_the_arcsine_law(x):
    assert beta_cdf(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), abs=1e-10)


@given(st.floats(0.01, 0.99), shapes, shapes)
def test_quantile_inverts_the_cdf(q, a, b):
    x = beta_quantile(q, a, b)
    slack = 1e-9
    assert beta_cdf(x - slack, a, b) <= q + 1e-9
    assert beta_cdf(x + slack, a, b) >= q - 1e-9


@given(shapes, shapes)
def test_mean_lies_in_the_unit_interval_and_intervals_nest(a, b):
    belief = Beta(a, b)
    low, high = belief.interval(0.9)
    inner_low, inner_high = belief.interval(0.5)
    assert 0.0 <= low <= inner_low <= inner_high <= high <= 1.0
    assert 0.0 < belief.mean < 1.0


@given(evidence(), evidence(), st.floats(0.0, 1.0))
def test_posterior_counts_stay_possible(first, second, discount):
    m = CellMastery().observe(first).faded(discount).observe(second)
    assert 0.0 <= m.passed <= m.samples + 1e-9
    assert 0.0 <= m.value_correct <= m.samples + 1e-9
    assert 0.0 <= m.informative_groups <= m.groups + 1e-9
    for rate in (m.pass_rate, m.value_rate, m.format_rate, m.group_rate):
        assert rate.a > 0.0
        assert rate.b > 0.0
    assert second.samples <= m.samples <= second.samples + discount * first.samples + 1e-9
    assert m.pass_rate.mean <= m.value_rate.mean + 1e-9
    assert CellMastery.from_dict(json.loads(json.dumps(m.to_dict()))) == m


@given(evidence())
def test_first_evidence_gives_the_conjugate_posterior(e):
    m = CellMastery().observe(e)
    assert m.pass_rate == Beta(0.5 + e.passed, 0.5 + e.samples - e.passed)
    assert m.value_rate == Beta(0.5 + e.value_correct, 0.5 + e.samples - e.value_correct)
    assert m.format_rate == Beta(0.5 + e.formatted, 0.5 + e.samples - e.formatted)
    groups = e.groups - e.informative_groups
    assert m.group_rate == Beta(0.5 + e.informative_groups, 0.5 + groups)


def test_a_passing_sample_raises_the_estimate_and_fading_widens_it():
    m = CellMastery().observe(CellEvidence("a/1", 40, 20, 24, 30))
    assert m.observe(CellEvidence("a/1", 1, 1, 1, 1)).pass_rate.mean > m.pass_rate.mean
    low, high = m.pass_rate.interval()
    faded_low, faded_high = m.faded(0.3).pass_rate.interval()
    assert faded_low < low < 0.5 < high < faded_high


def test_slow_change_is_tracked_with_a_fading_memory():
    m = CellMastery()
    for passed in (8, 9, 10, 11, 12):  # of 32, well within each other's intervals
        m = m.faded(0.7).observe(CellEvidence("a/1", 32, passed, passed, 32))
    weights = [0.7**k for k in range(4, -1, -1)]
    expected = sum(w * p for w, p in zip(weights, (8, 9, 10, 11, 12), strict=True))
    assert m.passed == pytest.approx(expected)
    assert m.samples == pytest.approx(32 * sum(weights))


def test_a_leap_drops_the_memory():
    before = CellMastery().observe(CellEvidence("a/1", 32, 0, 3, 3, 4, 0))
    drilled = CellEvidence("a/1", 32, 3, 4, 30, 4, 2)
    assert before.faded(0.7).observe(drilled) == CellMastery().observe(drilled)


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ({"samples": 4, "passed": 5, "value_correct": 4}, "passed is 5, out of 4"),
        ({"samples": 4, "formatted": -1}, "formatted is -1, out of 4"),
        ({"groups": 1, "informative_groups": 2}, "informative_groups is 2, out of 1"),
    ],
)
def test_impossible_counts_are_refused(counts, named):
    with pytest.raises(ValueError, match=named):
        CellMastery().observe(CellEvidence("a/1", **counts))
