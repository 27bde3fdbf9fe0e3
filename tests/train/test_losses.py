"""The objectives against an independent float64 oracle and its finite differences."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosr_jax.config import GrpoConfig
from cosr_jax.train.batching import TrainBatch
from cosr_jax.train.losses import (
    GrpoObjective,
    SftObjective,
    aggregate,
    importance_weight,
    kl_estimate,
    policy_loss,
)

ROWS, TIME, CONSTANT = 4, 5, 37.0
LENGTHS = [5, 2, 3, 0]  # the last row is padding


def oracle(config, logprobs, old, sampler, reference, advantages, frozen_old):
    """GRPO's loss written token by token; importance weights use ``frozen_old``."""
    rows = []
    for i, length in enumerate(LENGTHS):
        tokens = []
        for t in range(length):
            ratio = math.exp(logprobs[i, t] - old[i, t])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            loss = -min(ratio * advantages[i], clipped * advantages[i])
            if config.importance_cap:
                loss *= min(math.exp(frozen_old[i, t] - sampler[i, t]), config.importance_cap)
            if config.kl_coef:
                difference = logprobs[i, t] - reference[i, t]
                kl = {
                    "k1": difference,
                    "k2": difference**2 / 2,
                    "k3": math.exp(-difference) - 1 + difference,
                }[config.kl_estimator]
                loss += config.kl_coef * kl
            tokens.append(loss)
        rows.append(tokens)
    if config.aggregation == "sequence_mean":
        means = [sum(tokens) / len(tokens) for tokens in rows if tokens]
        return sum(means) / len(means)
    total = sum(sum(tokens) for tokens in rows)
    return total / (CONSTANT if config.aggregation == "dr_grpo" else sum(LENGTHS))


def finite_differences(function, at, step=1e-6):
    slopes = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (function(up) - function(down)) / (2 * step)
    return slopes


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    logprobs = -rng.uniform(0.5, 3.0, (ROWS, TIME))
    mask = np.arange(TIME) < np.array(LENGTHS)[:, None]
    return {
        "logprobs": logprobs,
        "old": logprobs + rng.normal(0, 0.4, (ROWS, TIME)),
        "sampler": logprobs + rng.normal(0, 0.4, (ROWS, TIME)),
        "reference": logprobs + rng.normal(0, 0.4, (ROWS, TIME)),
        "advantages": np.array([-0.7, 0.4, 1.0, 0.0]),
        "mask": mask,
    }


def batch_of(numbers, with_old):
    # What stands at padding must not matter, not even if it overflows.
    mask = numbers["mask"]
    poisoned = {k: np.where(mask, numbers[k], 1e4) for k in ("old", "sampler")}
    return TrainBatch(
        prompt_tokens=jnp.zeros((ROWS, 1), jnp.int32),
        prompt_mask=jnp.ones((ROWS, 1), bool),
        completion_tokens=jnp.zeros((ROWS, TIME), jnp.int32),
        completion_mask=jnp.asarray(mask),
        advantages=jnp.asarray(numbers["advantages"], jnp.float32),
        sampler_logprobs=jnp.asarray(poisoned["sampler"], jnp.float32),
        num_microbatches=jnp.int32(1),
        old_logprobs=jnp.asarray(poisoned["old"], jnp.float32) if with_old else None,
    )


OPTIONS = [
    GrpoConfig(aggregation=a, kl_coef=coef, kl_estimator=k, importance_cap=cap, clip_high=high)
    for a, (coef, k), cap, high in itertools.product(
        ("token_mean", "sequence_mean", "dr_grpo"),
        ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")),
        (0.0, 1.2),
        (0.2, 0.4),
    )
]


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize(
    "config",
    OPTIONS,
    ids=lambda c: f"{c.aggregation}-{c.kl_coef}{c.kl_estimator}-{c.importance_cap}-{c.clip_high}",
)
def test_loss_and_gradient_equal_the_oracle(config, with_old, numbers):
    objective, batch = GrpoObjective(config, 1.0, CONSTANT), batch_of(numbers, with_old)
    poisoned_reference = np.where(numbers["mask"], numbers["reference"], -1e4)
    reference = jnp.asarray(poisoned_reference, jnp.float32) if config.kl_coef else None
    assert objective.needs_reference == bool(config.kl_coef)

    def loss(logprobs):
        terms = objective(logprobs, jnp.zeros_like(logprobs), reference, batch)
        return terms.loss / objective.divisor(terms.weight)

    def expected(logprobs):
        fixed = numbers["old"] if with_old else numbers["logprobs"]
        return oracle(
            config,
            logprobs,
            fixed,
            numbers["sampler"],
            numbers["reference"],
            numbers["advantages"],
            fixed,
        )

    at = numbers["logprobs"]
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(at, jnp.float32))
    np.testing.assert_allclose(value, expected(at), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, finite_differences(expected, at), rtol=1e-4, atol=2e-6)


def test_the_clipped_tokens_are_reported(numbers):
    config = GrpoConfig(kl_coef=0.3)
    terms = GrpoObjective(config, 1.0, CONSTANT)(
        jnp.asarray(numbers["logprobs"], jnp.float32),
        jnp.full((ROWS, TIME), 2.0),
        jnp.asarray(numbers["reference"], jnp.float32),
        batch_of(numbers, True),
    )
    mask = numbers["mask"]
    ratio = np.exp(numbers["logprobs"] - numbers["old"])
    advantages = numbers["advantages"][:, None]
    low = mask & (ratio < 1 - config.clip_low) & (advantages < 0)
    high = mask & (ratio > 1 + config.clip_high) & (advantages > 0)
    gap = np.abs(numbers["old"] - numbers["sampler"])[mask]
    assert low.any()
    assert high.any()
    assert terms.tokens == mask.sum()
    expected = {
        "entropy": 2.0 * mask.sum(),
        "ratio/mean": ratio[mask].sum(),
        "clip_ratio/low_mean": low.sum(),
        "clip_ratio/high_mean": high.sum(),
        "clip_ratio/region_mean": (low | high).sum(),
        "sampling/sampling_logp_difference/mean": gap.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(terms.sums[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(terms.maxima["ratio/max"], ratio[mask].max(), rtol=1e-5)
    np.testing.assert_allclose(
        terms.maxima["sampling/sampling_logp_difference/max"], gap.max(), rtol=1e-5
    )


def test_the_kl_is_scaled_by_an_argument_and_costs_no_compilation(numbers):
    batch = batch_of(numbers, with_old=True)
    logprobs, reference = (jnp.asarray(numbers[k], jnp.float32) for k in ("logprobs", "reference"))

    @jax.jit
    def loss(batch):
        objective = GrpoObjective(GrpoConfig(kl_coef=0.3), 1.0, CONSTANT)
        return objective(logprobs, jnp.zeros_like(logprobs), reference, batch).loss

    def scaled(scale):
        return loss(dataclasses.replace(batch, kl_scale=jnp.float32(scale)))

    for scale in (0.5, 1.0, 2.0):
        objective = GrpoObjective(GrpoConfig(kl_coef=0.3 * scale), 1.0, CONSTANT)
        expected = objective(logprobs, jnp.zeros_like(logprobs), reference, batch).loss
        np.testing.assert_allclose(scaled(scale), expected, rtol=1e-6)
    assert loss._cache_size() == 1
    assert abs(scaled(2.0) - scaled(1.0)) > 1e-3


def test_sft_is_the_mean_negative_logprob_of_completion_tokens(numbers):
    logprobs, batch = jnp.asarray(numbers["logprobs"], jnp.float32), batch_of(numbers, False)
    terms = SftObjective()(logprobs, logprobs, None, batch)
    mean = -numbers["logprobs"][numbers["mask"]].mean()
    np.testing.assert_allclose(terms.loss / SftObjective().divisor(terms.weight), mean, rtol=1e-6)


def test_clipping_by_hand():
    ratio = jnp.array([[0.5, 1.0, 2.0]])
    up = policy_loss(ratio, jnp.array([[1.0]]), 0.2, 0.28)
    down = policy_loss(ratio, jnp.array([[-1.0]]), 0.2, 0.28)
    np.testing.assert_allclose(up, [[-0.5, -1.0, -1.28]], rtol=1e-6)
    np.testing.assert_allclose(down, [[0.8, 1.0, 2.0]], rtol=1e-6)


def test_importance_weights_are_capped_and_carry_no_gradient():
    gap = jnp.array([-1.0, 0.0, 5.0])
    np.testing.assert_allclose(importance_weight(gap, 2.0), [math.exp(-1), 1.0, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(importance_weight(gap, 0.0), [1.0, 1.0, 1.0])
    slopes = jax.grad(lambda g: importance_weight(g, 2.0).sum())(gap)
    np.testing.assert_array_equal(slopes, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("estimator, bound", [("k1", 0.004), ("k3", 0.004), ("k2", 0.02)])
def test_kl_estimators_average_to_the_divergence(estimator, bound):
    # k2 is biased; for close policies the bias is small.
    rng = np.random.default_rng(1)
    policy = rng.dirichlet(np.ones(5) * 5)
    reference = 0.8 * policy + 0.2 * rng.dirichlet(np.ones(5) * 5)
    exact = (policy * np.log(policy / reference)).sum()
    values = kl_estimate(jnp.asarray(np.log(policy / reference), jnp.float32), estimator)
    assert abs((policy * np.asarray(values)).sum() - exact) < bound * (
        1 if estimator == "k2" else 0.01
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="KL estimator 'k4'"):
        kl_estimate(jnp.zeros(1), "k4")
    with pytest.raises(ValueError, match="aggregation 'mean'"):
        aggregate(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), "mean")


def test_splitting_a_batch_changes_no_sum(numbers):
    config = dataclasses.replace(GrpoConfig(), aggregation="sequence_mean")
    batch, objective = batch_of(numbers, True), GrpoObjective(config, 1.0, CONSTANT)
    logprobs = jnp.asarray(numbers["logprobs"], jnp.float32)
    whole = objective(logprobs, logprobs, None, batch)
    parts = [
        objective(
            logprobs[piece],
            logprobs[piece],
            None,
            jax.tree.map(lambda x, piece=piece: x[piece] if x.ndim else x, batch),
        )
        for piece in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(p.loss for p in parts), whole.loss, rtol=1e-6)
    np.testing.assert_allclose(sum(p.weight for p in parts), whole.weight)
