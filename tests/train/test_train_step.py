"""The compiled step: what must not matter does not, and what must move moves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_fixtures import LORA, compiled_step, grpo_rows, sft_rows, tiny_student

from cosr_jax.config import GrpoConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.sharding import make_mesh
from cosr_jax.student.model import abstract_student, merge
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import (
    batch_shards,
    init_state,
    make_logprobs_fn,
    make_schedule,
    make_train_step,
)

TRAIN = TrainConfig(microbatch_size=8, logit_chunk=32)
GRPO = GrpoObjective(GrpoConfig(kl_coef=0.1), 0.9, 8 * 16.0)


def start(student, train=TRAIN, mesh=None):
    return init_state(jax.tree.map(jnp.copy, student.lora), train, mesh)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def relative(a, b):
    return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))


def gradient_of(state):
    """The clipped gradient of the first step, from Adam's first moment."""
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / np.float32(0.1), moment)


def moved(after, before):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, before)


def take_steps(objective, rows, microbatch, mesh=None, steps=1, rate=1e-3):
    student = tiny_student(mesh)
    train = dataclasses.replace(TRAIN, microbatch_size=microbatch)
    step = compiled_step(objective, train, mesh)
    state = start(student, train, mesh)
    for _ in range(steps):
        state, metrics = step(state, student.base, rows(8, microbatch, batch_shards(mesh)), rate)
    return state, metrics


@pytest.fixture(scope="module")
def unsharded():
    """(state, metrics) of one step on one device in one microbatch, by objective."""
    return {
        name: take_steps(objective, rows, 8)
        for name, objective, rows in (("grpo", GRPO, grpo_rows), ("sft", SftObjective(), sft_rows))
    }


@pytest.mark.parametrize("size", [4, 2, 1])
def test_accumulation_over_any_number_of_microbatches_is_the_same_update(size, unsharded):
    before = tiny_student().lora
    whole, metrics = unsharded["grpo"]
    split, split_metrics = take_steps(GRPO, grpo_rows, size)
    assert relative(gradient_of(split), gradient_of(whole)) <= 1e-5
    update = moved(whole.lora, before)
    assert relative(moved(split.lora, before), update) <= 1e-5
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "dr_grpo"])
def test_accumulation_holds_for_every_aggregation(aggregation):
    objective = GrpoObjective(GrpoConfig(aggregation=aggregation), 0.9, 128.0)
    whole, _ = take_steps(objective, grpo_rows, 8)
    split, _ = take_steps(objective, grpo_rows, 2)
    assert relative(gradient_of(split), gradient_of(whole)) <= 1e-5


@pytest.mark.parametrize(
    "sizes, name",
    [
        ((8, 1, 1), "grpo"),
        ((1, 8, 1), "grpo"),
        ((1, 4, 2), "grpo"),
        ((1, 2, 4), "grpo"),
        ((2, 2, 2), "sft"),
    ],
)
def test_eight_devices_equal_one(sizes, name, unsharded):
    objective, rows = {"grpo": (GRPO, grpo_rows), "sft": (SftObjective(), sft_rows)}[name]
    one, one_metrics = unsharded[name]
    many, many_metrics = take_steps(objective, rows, 8, make_mesh(MeshConfig(*sizes)))
    assert relative(gradient_of(many), gradient_of(one)) <= 1e-5
    assert relative(many.lora, one.lora) <= 1e-5
    for metric, value in one_metrics.items():
        np.testing.assert_allclose(
            many_metrics[metric], value, rtol=1e-4, atol=1e-6, err_msg=metric
        )


@pytest.mark.parametrize("remat", ["none", "mlp", "dots"])
def test_what_is_computed_again_does_not_change_the_gradient(remat, unsharded):
    student = tiny_student()
    graphdef = abstract_student(student.config, StudentConfig(remat=remat), LORA).graphdef
    step = make_train_step(dataclasses.replace(student, graphdef=graphdef), SftObjective(), TRAIN)
    state, _ = step(start(student), student.base, sft_rows(8), 1e-3)
    assert relative(gradient_of(state), gradient_of(unsharded["sft"][0])) <= 1e-5


def test_the_logprobs_program_is_the_same_on_a_mesh():
    mesh, batch = make_mesh(MeshConfig(1, 4, 2)), sft_rows(8, 4)
    train = dataclasses.replace(TRAIN, microbatch_size=4)
    values = []
    for where in (None, mesh):
        student = tiny_student(where)
        program = make_logprobs_fn(student, train, 1.0, where)
        values.append(program(student.lora, student.base, batch))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-5)


def test_the_gradient_equals_that_of_a_dense_loss_over_the_merged_student():
    student, batch = tiny_student(), jax.tree.map(np.asarray, sft_rows(4))

    @jax.jit
    @jax.value_and_grad
    def dense_loss(lora):
        module = merge(student.graphdef, lora, student.base)
        total = 0.0
        for row in range(batch.rows):  # each row alone: neither padding nor batching
            prompt = batch.prompt_tokens[row][batch.prompt_mask[row]]
            completion = batch.completion_tokens[row][batch.completion_mask[row]]
            tokens = np.concatenate([prompt, completion])[None]
            hidden = module(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
            logprobs = jax.nn.log_softmax(module.logits(hidden))[0, prompt.size - 1 : -1]
            total -= jnp.take_along_axis(logprobs, completion[:, None], axis=1).sum()
        return total / batch.completion_mask.sum()

    loss, gradient = dense_loss(student.lora)
    train = dataclasses.replace(TRAIN, clip_norm=1e9, microbatch_size=2)
    step = make_train_step(student, SftObjective(), train)
    state, metrics = step(start(student, train), student.base, sft_rows(4, 2), 1e-3)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(gradient), rtol=1e-4)
    assert relative(gradient_of(state), gradient) <= 1e-4


def test_the_first_grpo_step_is_on_policy_and_the_reference_is_the_student_without_adapters():
    student, batch = tiny_student(), grpo_rows(8)
    step = compiled_step(GRPO, TRAIN)
    module = merge(student.graphdef, student.lora, student.base)
    prompts, reals = (
        jnp.repeat(x, batch.group, axis=0) for x in (batch.prompt_tokens, batch.prompt_mask)
    )
    tokens = jnp.concatenate([prompts, batch.completion_tokens], axis=1)
    mask = jnp.concatenate([reals, batch.completion_mask], axis=1).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    prompt = batch.prompt_tokens.shape[1]

    @functools.partial(jax.jit, static_argnames="adapters")
    def chosen(adapters):
        logits = module.logits(module(tokens, positions, mask, adapters)) / GRPO.temperature
        logprobs = jax.nn.log_softmax(logits)[:, prompt - 1 : -1]
        return jnp.take_along_axis(logprobs, batch.completion_tokens[..., None], -1)[..., 0]

    difference = np.asarray(chosen(adapters=False) - chosen(adapters=True), np.float64)
    difference = difference[batch.completion_mask]
    _, metrics = step(start(student), student.base, batch, 1e-3)
    assert metrics["ratio/max"] == 1.0
    assert metrics["clip_ratio/region_mean"] == 0.0
    expected = (np.exp(difference) - 1 - difference).mean()
    assert expected > 1e-3
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-3)


def test_a_second_update_on_one_batch_sees_the_first_ones_policy_as_old():
    student, batch = tiny_student(), grpo_rows(8)
    old, _ = make_logprobs_fn(student, TRAIN, GRPO.temperature)(student.lora, student.base, batch)
    batch = dataclasses.replace(batch, old_logprobs=old)
    step = compiled_step(GRPO, TRAIN)
    state, first = step(start(student), student.base, batch, 1e-2)
    _, second = step(state, student.base, batch, 1e-2)
    np.testing.assert_allclose(first["ratio/max"], 1.0, atol=1e-4)
    assert abs(second["ratio/mean"] - 1) > 1e-3 or second["ratio/max"] > 1.01


def test_adapters_train_and_the_base_keeps_every_bit():
    student = tiny_student()
    base = jax.tree.map(np.array, student.base)
    step = compiled_step(SftObjective(), TRAIN)
    state, losses = start(student), []
    for _ in range(20):
        state, metrics = step(state, student.base, sft_rows(8), 1e-2)
        losses.append(float(metrics["loss"]))
    # From log(64) = 4.2 towards 2.3: a normed hidden state of length 32**0.5 and a frozen
    # embedding of about 0.34 allow logits of 1.9 at most, however long one trains.
    assert losses[-1] < losses[0] - 1.5
    for after, before in zip(jax.tree.leaves(student.base), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(np.array(after).view(np.uint32), before.view(np.uint32))
    for after, before in zip(
        jax.tree.leaves(state.lora), jax.tree.leaves(student.lora), strict=True
    ):
        assert (after != before).any()


def test_a_nonfinite_update_is_skipped_and_counted():
    student = tiny_student()
    step = compiled_step(GRPO, TRAIN)
    good = grpo_rows(8)
    bad = dataclasses.replace(good, advantages=good.advantages.at[0].set(jnp.nan))
    state, _ = step(start(student), student.base, good, 1e-3)
    kept = jax.tree.map(np.array, (state.lora, state.opt_state))
    for skips in (1, 2):
        state, metrics = step(state, student.base, bad, 1e-3)
        assert metrics["nonfinite"] == skips
        for after, before in zip(
            jax.tree.leaves((state.lora, state.opt_state)), jax.tree.leaves(kept), strict=True
        ):
            np.testing.assert_array_equal(after, before)
    state, metrics = step(state, student.base, good, 1e-3)
    assert (metrics["nonfinite"], metrics["nonfinite_total"]) == (0.0, 2.0)
    assert int(state.step) == 4
    assert relative(state.lora, kept[0]) > 0


def test_one_program_serves_a_bucket_whatever_the_rows_rate_or_lengths():
    student = tiny_student()
    train = dataclasses.replace(TRAIN, microbatch_size=2)
    step = make_train_step(student, SftObjective(), train)
    state = start(student, train)
    full = sft_rows(8, 2)
    for rows, rate in ((8, 1e-3), (3, 5e-4), (1, 0.0)):
        real = jnp.arange(8) < rows
        batch = dataclasses.replace(
            full,
            completion_mask=full.completion_mask & real[:, None],
            num_microbatches=jnp.int32(-(-rows // 2)),
        )
        state, metrics = step(state, student.base, batch, rate)
        assert metrics["tokens"] == batch.completion_mask.sum()
        np.testing.assert_allclose(metrics["learning_rate"], rate)
    assert step._cache_size() == 1


def test_padding_rows_and_unvisited_microbatches_change_nothing():
    train = dataclasses.replace(TRAIN, microbatch_size=2)
    student = tiny_student()
    few = sft_rows(4, 2)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1)) if x.ndim else x, few
    )
    step = compiled_step(SftObjective(), train)
    exact, _ = step(start(student, train), student.base, few, 1e-3)
    early, _ = step(start(student, train), student.base, padded, 1e-3)
    visited = dataclasses.replace(padded, num_microbatches=jnp.int32(4))
    late, _ = step(start(student, train), student.base, visited, 1e-3)
    assert relative(early.lora, exact.lora) == 0
    assert relative(gradient_of(late), gradient_of(exact)) <= 1e-6


def test_the_learning_rate_scales_the_update_and_decay_is_adamws():
    student = tiny_student()
    train = dataclasses.replace(TRAIN, weight_decay=0.1)
    step = make_train_step(student, SftObjective(), train)

    def update(rate):
        state, _ = step(start(student, train), student.base, sft_rows(8), rate)
        return gradient_of(state), moved(state.lora, student.lora)

    gradient, change = update(1e-2)
    np.testing.assert_allclose(flat(update(2e-2)[1]), 2 * flat(change), rtol=1e-3, atol=1e-6)
    theirs = optax.chain(
        optax.clip_by_global_norm(train.clip_norm), optax.adamw(1e-2, weight_decay=0.1)
    )
    updates, _ = jax.jit(theirs.update)(gradient, theirs.init(student.lora), student.lora)
    assert relative(change, updates) < 1e-3


def test_dropout_draws_anew_each_step_and_repeats_with_its_seed():
    student = tiny_student(lora=dataclasses.replace(LORA, dropout=0.5))

    def two_losses(step):
        state, first = step(start(student), student.base, sft_rows(8), 0.0)
        _, second = step(state, student.base, sft_rows(8), 0.0)
        return float(first["loss"]), float(second["loss"])

    none, zero, one = (
        make_train_step(student, SftObjective(), TRAIN, dropout_seed=seed) for seed in (None, 0, 1)
    )
    off, on, other = two_losses(none), two_losses(zero), two_losses(one)
    assert off[0] == off[1]
    assert two_losses(zero) == on
    assert len({off[0], *on, *other}) == 5


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.854, 0.5, 0.146]),
    ],
)
def test_schedules_start_at_the_peak_and_end_with_the_run(schedule, expected):
    plain = TrainConfig(schedule=schedule, max_rounds=2, steps_per_round=2)
    factors = [float(make_schedule(plain)(jnp.int32(i))) for i in range(4)]
    np.testing.assert_allclose(factors, expected, atol=1e-3)
    warm = make_schedule(dataclasses.replace(plain, warmup_steps=3, max_rounds=4))
    np.testing.assert_allclose([float(warm(jnp.int32(i))) for i in range(4)], [0.25, 0.5, 0.75, 1])


def test_a_batch_cut_for_other_microbatches_is_refused():
    student = tiny_student()
    step = make_train_step(student, SftObjective(), dataclasses.replace(TRAIN, microbatch_size=3))
    with pytest.raises(ValueError, match="8 rows is not made of microbatches of 3"):
        step(start(student), student.base, sft_rows(8, 8), 1e-3)
