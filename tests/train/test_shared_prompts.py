"""Prompts computed once for their group: the same numbers for fewer operations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_fixtures import LORA, TINY, group, tiny_student

from cosr_jax.config import MeshConfig, StudentConfig
from cosr_jax.sharding import make_mesh
from cosr_jax.student.lora import count_parameters
from cosr_jax.student.model import abstract_student, merge
from cosr_jax.train.batching import TrainBatch, batch_shape, grpo_batch
from cosr_jax.train.logprobs import batch_logprobs

SAMPLES = 4


def shared_batch(rewards=(1.0, 0.0, 0.0, 1.0)) -> TrainBatch:
    """Two groups whose prompts and completions have different lengths."""
    groups = [group(list(rewards), seed, prompt_length=3 + 4 * seed) for seed in range(2)]
    batch, _ = grpo_batch(groups, batch_shape(8, 8, 16, 16), scale_advantages=True)
    assert batch is not None and batch.group == SAMPLES
    return batch


def unshared(batch: TrainBatch) -> TrainBatch:
    """Every row with a prompt of its own."""
    return dataclasses.replace(
        batch,
        prompt_tokens=jnp.repeat(batch.prompt_tokens, batch.group, axis=0),
        prompt_mask=jnp.repeat(batch.prompt_mask, batch.group, axis=0),
    )


def logprobs_and_gradient(student, batch, dropout_key=None):
    weights = jax.random.normal(jax.random.key(5), batch.completion_mask.shape)

    @jax.jit
    @jax.value_and_grad
    def weighted(lora):
        module = merge(student.graphdef, lora, student.base)
        values, *_ = batch_logprobs(module, batch, 0.9, 64, dropout_key=dropout_key)
        return jnp.where(batch.completion_mask, values * weights, 0.0).sum()

    return weighted(student.lora)


def relative(a, b) -> float:
    flat = [np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(t)]) for t in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def test_loss_and_gradient_equal_those_of_repeated_prompts():
    student, batch = tiny_student(), shared_batch()
    loss, gradient = logprobs_and_gradient(student, batch)
    expected, expected_gradient = logprobs_and_gradient(student, unshared(batch))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert relative(gradient, expected_gradient) <= 1e-5


def test_prompts_teach_through_their_keys_and_values():
    """A gradient that stopped at the prompt would miss what the first half of it contributes."""
    student, batch = tiny_student(), shared_batch()
    _, whole = logprobs_and_gradient(student, batch)
    cut = dataclasses.replace(batch, prompt_mask=batch.prompt_mask.at[:, :-2].set(False))
    _, without = logprobs_and_gradient(student, cut)
    assert relative(without, whole) > 0.05


def test_a_sample_without_verdict_leaves_an_empty_row_and_whole_groups():
    batch = shared_batch((1.0, None, 0.0, 1.0))
    assert batch.completion_mask.any(1).tolist() == [True, False, True, True] * 2
    loss, gradient = logprobs_and_gradient(tiny_student(), batch)
    expected, expected_gradient = logprobs_and_gradient(tiny_student(), unshared(batch))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert relative(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize(
    ("samples", "microbatch", "shards", "expected"),
    [(8, 8, 1, 4), (8, 4, 1, 4), (8, 2, 1, 1), (8, 8, 2, 4), (8, 8, 8, 1), (16, 16, 4, 4)],
)
def test_prompts_are_shared_where_every_shard_holds_whole_groups(
    samples, microbatch, shards, expected
):
    assert batch_shape(samples, microbatch, 16, 16, shards).group(SAMPLES) == expected


def test_groups_of_different_sizes_have_a_prompt_a_row():
    groups = [group([1.0, 0.0, 0.0, 1.0], 0), group([1.0, 0.0], 1)]
    batch, _ = grpo_batch(groups, batch_shape(8, 8, 16, 16), scale_advantages=True)
    assert batch is not None and batch.group == 1


def test_the_compiler_counts_the_saving_that_was_predicted():
    """Prompt 512, completions 8 x 128, one layer, nothing computed again.

    Said beforehand: 512 + 1024 tokens pass the layer instead of 8 x 640.  A token costs a layer's
    products forward and backward, 4 operations a frozen weight and 6 an adapter's; a pair of query
    and key 14 a head's width and head: 2 products forward and 5 backward of 2 operations.  Blocks
    of 64 or 80 queries meet keys up to their own end.  The vocabulary costs both the same.
    """
    prompt, completion, samples = 512, 128, 8
    shape = dataclasses.replace(TINY, num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    student = abstract_student(shape, StudentConfig(remat="none"), LORA)
    layer = count_parameters(student.base["layers"])
    each_token = 4 * layer + 6 * count_parameters(student.lora)
    each_pair = 14 * shape.num_attention_heads * shape.head_dim

    def triangle(time: int, block: int) -> int:
        return block * block * (time // block) * (time // block + 1) // 2

    saved_tokens = samples * (prompt + completion) - (prompt + samples * completion)
    saved_pairs = samples * triangle(640, 80) - (
        triangle(512, 64) + samples * triangle(128, 64) + samples * completion * prompt
    )
    predicted = saved_tokens * each_token + saved_pairs * each_pair

    def batch(prompts: int) -> TrainBatch:
        rows = jnp.ones((samples, completion))
        past = jnp.ones((prompts, prompt), jnp.int32)
        ones = rows.astype(jnp.int32)
        return TrainBatch(past, past > 0, ones, ones > 0, jnp.ones(samples), rows, jnp.int32(1))

    def operations(prompts: int) -> float:
        def loss(lora, base):
            module = merge(student.graphdef, lora, base)
            return batch_logprobs(module, batch(prompts), 1.0, 1024)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(student.lora, student.base).compile()
        return compiled.cost_analysis()["flops"]

    counted = operations(samples) - operations(1)
    assert counted == pytest.approx(predicted, rel=0.15)


def test_shared_prompts_on_a_mesh_equal_one_device():
    batch = shared_batch()
    loss, gradient = logprobs_and_gradient(tiny_student(), batch)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with jax.set_mesh(mesh):
        many, many_gradient = logprobs_and_gradient(tiny_student(mesh), batch)
    np.testing.assert_allclose(many, loss, rtol=1e-5)
    assert relative(many_gradient, gradient) <= 1e-5
