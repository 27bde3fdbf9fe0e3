import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.rollout.sampling import (
    categorical,
    draw_token,
    row_keys,
    seed_key,
    truncate,
    uniforms,
)

invert = jax.jit(categorical)

#: Upper 1e-6 quantiles of the chi-square distribution would need SciPy: Wilson and Hilferty's cube
#: (PNAS 17, 1931) is within a percent of them from 3 degrees of freedom on.
Z = 4.75


def chi_square_bound(freedom: int) -> float:
    return freedom * (1 - 2 / (9 * freedom) + Z * np.sqrt(2 / (9 * freedom))) ** 3


def chi_square(drawn, probs, least=5.0):
    """The statistic and its degrees of freedom; entries expected under ``least`` times are one."""
    expected = probs * len(drawn)
    counts = np.bincount(drawn, minlength=len(probs))
    rare = expected < least
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    assert counts[expected == 0].sum() == 0
    expected, counts = expected[expected > 0], counts[expected > 0]
    return ((counts - expected) ** 2 / expected).sum(), len(expected) - 1


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def oracle_truncate(logits, top_p, top_k):
    """Which entries stay, by the definitions, in float64: one row at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    kept, reached = [], 0.0
    probs = softmax(np.asarray(logits)[order])
    for token, prob in zip(order, probs, strict=True):
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += prob
    return sorted(kept)


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
def test_draws_follow_the_softmax(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    logits[rng.random(vocab) < 0.2] = -np.inf
    draws = 20_000
    uniforms = rng.random(draws, dtype=np.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, vocab))
    statistic, freedom = chi_square(np.asarray(invert(rows, uniforms)), softmax(logits))
    assert statistic < chi_square_bound(freedom)


def test_the_chi_square_test_would_notice_a_wrong_distribution():
    rng = np.random.default_rng(0)
    probs = softmax(rng.normal(0, 1, 50))
    drawn = rng.choice(50, 20_000, p=softmax(np.log(probs) / 0.9))
    statistic, freedom = chi_square(drawn, probs)
    assert statistic > chi_square_bound(freedom)


def test_even_uniforms_hit_every_token_in_proportion():
    """The inverse is a step function of the uniform number: no chance is left in this test."""
    probs = np.array([0.125, 0.0, 0.5, 0.25, 0.125])
    with np.errstate(divide="ignore"):
        logits = np.log(probs).astype(np.float32)
    uniforms = (np.arange(800, dtype=np.float32) + 0.5) / 800
    drawn = np.asarray(invert(jnp.tile(jnp.asarray(logits), (800, 1)), uniforms))
    assert np.bincount(drawn, minlength=5).tolist() == [100, 0, 400, 200, 100]
    assert (np.diff(drawn) >= 0).all()


edge_uniforms = st.sampled_from([0.0, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])
some_logits = st.one_of(
    st.just(-np.inf),
    st.floats(-30, 30, width=32),
    st.sampled_from([-3.0e37, -1e4, -104.0, -87.5, 0.0, 1e4, 3.0e37]),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(some_logits, min_size=1, max_size=12).filter(lambda x: max(x) > -np.inf),
    st.one_of(edge_uniforms, st.floats(0, 1, exclude_max=True, width=32)),
    st.integers(0, 299),
    st.sampled_from([0.25, 1.0]),
    st.sampled_from([(1.0, 0), (1.0, 2), (0.9, 0), (0.5, 3)]),
)
def test_a_drawn_token_is_possible_and_its_logprob_is_renormalised(
    values, uniform, shift, temperature, truncation
):
    """One row of 300 logits, so two blocks: the values at ``shift``, impossible elsewhere."""
    logits = np.full(300, -np.inf, np.float32)
    places = (np.arange(len(values)) * 37 + shift) % 300
    logits[places] = values
    top_p, top_k = truncation
    token, logprob = draw(logits, uniform, temperature, top_p, top_k)
    scaled = logits / np.float32(temperature)
    if truncation != (1.0, 0):
        scaled = np.asarray(truncate(scaled[None], np.float32(top_p), np.int32(top_k)))[0]
    assert scaled[token] > -np.inf
    with np.errstate(divide="ignore"):
        expected = np.log(softmax(scaled))
    np.testing.assert_allclose(logprob, expected[token], rtol=1e-5, atol=1e-5)
    assert logprob > -104  # what underflows to no mass is never drawn


@jax.jit
def _draw(logits, uniform, temperature, top_p, top_k):
    return draw_token(
        logits[None], uniform[None], temperature, top_p, top_k, greedy=False, truncated=True
    )


@jax.jit
def _draw_all(logits, uniform, temperature):
    return draw_token(
        logits[None], uniform[None], temperature, 1.0, 0, greedy=False, truncated=False
    )


def draw(logits, uniform, temperature, top_p, top_k):
    uniform, temperature = np.float32(uniform), np.float32(temperature)
    if top_p < 1 or top_k:
        token, logprob = _draw(logits, uniform, temperature, np.float32(top_p), np.int32(top_k))
    else:
        token, logprob = _draw_all(logits, uniform, temperature)
    return int(token[0]), float(logprob[0])


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (1.0, 1), (1.0, 7), (0.3, 0), (0.9, 0), (0.7, 5), (0.999, 40)]
)
def test_truncation_keeps_what_its_definition_says(top_p, top_k):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (20, 40)).astype(np.float32)
    logits[:4] = np.round(logits[:4])  # ties go by token id
    kept = np.asarray(truncate(jnp.asarray(logits), jnp.float32(top_p), jnp.int32(top_k)))
    for row, original in zip(kept, logits, strict=True):
        stays = np.flatnonzero(row > -np.inf)
        assert stays.tolist() == oracle_truncate(original.tolist(), top_p, top_k)
        np.testing.assert_array_equal(row[stays], original[stays])


def test_the_nucleus_ends_at_the_token_that_reaches_it():
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.25, 0.125]]))
    for top_p, expected in ((0.4, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2])):
        kept = truncate(logits, jnp.float32(top_p), jnp.int32(0))
        assert np.flatnonzero(np.asarray(kept[0]) > -np.inf).tolist() == expected


def test_truncated_draws_report_the_renormalised_probability():
    probs = np.array([0.1, 0.4, 0.2, 0.3])
    logits = np.log(probs).astype(np.float32)
    for uniform in np.linspace(0, 0.999, 21):
        token, logprob = draw(logits, uniform, 1.0, 0.6, 3)  # of 0.4, 0.3, 0.2: the first two
        assert token in (1, 3)
        assert logprob == pytest.approx(np.log(probs[token] / 0.7), abs=1e-6)


def test_temperature_sharpens_the_distribution_and_its_logprobs():
    logits = np.log(np.array([0.2, 0.8])).astype(np.float32)
    sharp = np.array([0.2, 0.8]) ** 2 / (0.2**2 + 0.8**2)
    assert draw(logits, 0.0, 0.5, 1.0, 0) == (0, pytest.approx(np.log(sharp[0]), abs=1e-6))
    assert draw(logits, 0.1, 0.5, 1.0, 0) == (1, pytest.approx(np.log(sharp[1]), abs=1e-6))


def test_greedy_takes_the_likeliest_under_the_plain_softmax():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.5, 0.25, 0.25]]))
    token, logprob = draw_token(
        logits, jnp.zeros(2), jnp.float32(0), 0.1, 1, greedy=True, truncated=False
    )
    assert token.tolist() == [1, 0]
    np.testing.assert_allclose(logprob, np.log([0.5, 0.5]), rtol=1e-6)


def tree_sum(x, *_, **__):
    return jax.lax.associative_scan(jnp.add, x, axis=-1)


def test_no_impossible_token_where_sums_are_rounded_in_tree_order(monkeypatch):
    """Accelerators may sum in a tree; its rounding makes the sum rise at entries of zero."""
    monkeypatch.setattr(jnp, "matmul", tree_sum)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (500, 300)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.9] = -np.inf
    logits[:, 0] = 0.0
    weights = np.exp(logits - logits.max(-1, keepdims=True))[:, :256]
    running = np.asarray(tree_sum(jnp.asarray(weights)))
    gaps = np.argwhere((np.diff(running) > 0) & (weights[:, 1:] == 0))
    assert len(gaps) > 200
    rows, columns = gaps.T
    aimed = running[rows, columns] / np.exp(logits[rows] - logits[rows].max(-1)[:, None]).sum(-1)
    in_tree_order = jax.jit(lambda *arguments: categorical(*arguments))
    for numbers in (aimed, np.zeros(len(rows)), np.full(len(rows), 1 - 2.0**-24)):
        drawn = np.asarray(in_tree_order(jnp.asarray(logits[rows]), numbers.astype(np.float32)))
        assert drawn.max() < 300
        assert (logits[rows, drawn] > -np.inf).all()


@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**20)), min_size=1, max_size=9),
)
def test_random_numbers_are_those_of_jax(seed, pairs):
    rows, numbers = (jnp.asarray(column, jnp.int32) for column in zip(*pairs, strict=True))

    def one(row, number):
        key = jax.random.fold_in(jax.random.key(seed), row)
        return jax.random.uniform(jax.random.fold_in(key, number))

    drawn = uniforms(row_keys(jnp.asarray(seed_key(seed)), rows), numbers)
    np.testing.assert_array_equal(drawn, jax.vmap(one)(rows, numbers))


@given(st.integers(-(2**31), 2**70))
def test_seeds_of_64_bits_give_keys_of_their_own(seed):
    high, low = seed_key(seed).tolist()
    assert (high << 32) + low == seed % 2**64
