import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.run.statistics import paired_bootstrap, standard_error, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_table(successes, n, low, high):
    np.testing.assert_allclose(wilson_interval(successes, n), (low, high), atol=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_lies_in_the_unit_interval_around_the_rate_and_mirrors(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    assert low < high
    mirrored = wilson_interval(n - successes, n)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-12)


@pytest.mark.parametrize(("n", "p"), [(20, 0.1), (100, 0.5), (250, 0.9)])
def test_wilson_covers_about_95_percent(n, p):
    counts = np.random.default_rng(0).binomial(n, p, size=4000)
    low, high = np.array([wilson_interval(int(c), n) for c in range(n + 1)]).T
    coverage = np.mean((low[counts] <= p) & (p <= high[counts]))
    assert 0.93 <= coverage <= 0.98


def test_wilson_without_trials_knows_nothing_and_refuses_nonsense():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for successes, n in ((3, 2), (-1, 2), (0, -1)):
        with pytest.raises(ValueError, match=f"{successes} successes out of {n}"):
            wilson_interval(successes, n)


def test_standard_error_by_hand():
    assert standard_error(0.5, 100) == pytest.approx(0.05)


def test_bootstrap_agrees_with_resampling_indices():
    rng = np.random.default_rng(1)
    before, after = rng.random(80) < 0.3, rng.random(80) < 0.6
    change = after.astype(float) - before
    index = rng.integers(80, size=(40_000, 80))
    expected = np.quantile(change[index].mean(axis=1), [0.025, 0.975])
    gain, low, high = paired_bootstrap(before, after, resamples=40_000)
    assert gain == change.mean()
    np.testing.assert_allclose((low, high), expected, atol=0.0126)  # one task of 80


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_bootstrap_covers_the_true_gain(kind):
    rng = np.random.default_rng(2)
    hits = []
    for trial in range(400):
        before, after = rng.random((2, 200))
        if kind == "bool":
            before, after = before < 0.2, after < 0.5
            truth = 0.3
        else:
            after, truth = after + 0.1, 0.1
        _, low, high = paired_bootstrap(before, after, resamples=400, seed=trial)
        hits.append(low <= truth <= high)
    assert 0.91 <= np.mean(hits) <= 0.98


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(3)
    skill = rng.random(200)
    before, after = skill < 0.5, skill < 0.6  # whoever could still can
    _, low, high = paired_bootstrap(before, after)
    _, loose_low, loose_high = paired_bootstrap(rng.permutation(before), after)
    assert high - low < 0.6 * (loose_high - loose_low)
    assert low > 0


def test_bootstrap_is_deterministic_and_its_seed_counts():
    rng = np.random.default_rng(4)
    before, after = rng.random((2, 50))
    assert paired_bootstrap(before, after, seed=5) == paired_bootstrap(before, after, seed=5)
    assert paired_bootstrap(before, after, seed=5) != paired_bootstrap(before, after, seed=6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_holds_the_gain_and_turns_with_the_sides(pairs):
    before, after = zip(*pairs, strict=True)
    gain, low, high = paired_bootstrap(before, after, resamples=200)
    assert -1.0 <= low <= high <= 1.0
    assert low - 2 / len(pairs) <= gain <= high + 2 / len(pairs)
    assert paired_bootstrap(after, before, resamples=200).gain == pytest.approx(-gain)


def test_no_change_is_a_point_at_zero():
    assert paired_bootstrap([True, False], [True, False]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([1, 0], [1], "not pairs"),
        ([], [], "not pairs"),
        ([[1.0]], [[1.0]], "not pairs"),
        ([float("nan")], [1.0], "not finite"),
    ],
)
def test_bootstrap_refuses_what_is_not_paired_scores(before, after, words):
    with pytest.raises(ValueError, match=words):
        paired_bootstrap(before, after)
