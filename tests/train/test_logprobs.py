"""Chunked log-probabilities against the dense softmax, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from train_fixtures import TINY, sft_rows, tiny_student

from cosr_jax.config import TrainConfig
from cosr_jax.student.model import merge
from cosr_jax.train.batching import TrainBatch
from cosr_jax.train.logprobs import batch_logprobs, completion_logprobs
from cosr_jax.train.step import make_logprobs_fn

ROWS, TIME, WIDTH, VOCAB = 3, 7, 8, 50


def dense(hidden, kernel, targets, temperature, softcap=0.0):
    logits = hidden @ kernel
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logprobs = jax.nn.log_softmax(logits / temperature)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (ROWS, TIME, WIDTH)),
        jax.random.normal(keys[1], (WIDTH, VOCAB)),
        jax.random.randint(keys[2], (ROWS, TIME), 0, VOCAB),
        jax.random.normal(keys[3], (ROWS, TIME)),  # cotangent
    )


@pytest.mark.parametrize("chunk", [1, 6, 9, 21, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.6, 0.0), (0.6, 3.0)])
def test_values_and_gradient_equal_the_dense_softmax(inputs, chunk, temperature, softcap):
    hidden, kernel, targets, cotangent = inputs
    for ours, theirs in zip(
        completion_logprobs(hidden, kernel, targets, temperature, chunk, softcap),
        dense(hidden, kernel, targets, temperature, softcap),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda h, f=f: (f(h)[0] * cotangent).sum())(hidden)
        for f in (
            lambda h: completion_logprobs(h, kernel, targets, temperature, chunk, softcap),
            lambda h: dense(h, kernel, targets, temperature, softcap),
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_equals_finite_differences(inputs):
    hidden, kernel, targets, cotangent = inputs
    direction = jax.random.normal(jax.random.key(9), hidden.shape)

    def along(step):
        values, _ = completion_logprobs(hidden + step * direction, kernel, targets, 0.8, 6)
        return float((np.asarray(values, np.float64) * np.asarray(cotangent)).sum())

    gradient = jax.grad(
        lambda h: (completion_logprobs(h, kernel, targets, 0.8, 6)[0] * cotangent).sum()
    )(hidden)
    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-3)


def test_entropy_and_kernel_carry_no_gradient(inputs):
    hidden, kernel, targets, _ = inputs
    along_hidden, along_kernel = jax.grad(
        lambda h, k: completion_logprobs(h, k, targets, 1.0, 6)[1].sum(), argnums=(0, 1)
    )(hidden, kernel)
    assert not along_hidden.any()
    assert not along_kernel.any()


def shapes(jaxpr: Jaxpr):
    """Shapes of all values in ``jaxpr`` and the programs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, Jaxpr):
                yield from shapes(inner)


def test_no_array_holds_all_tokens_logits_forward_or_backward(inputs):
    hidden, kernel, targets, cotangent = inputs

    def largest(function):
        loss = lambda h: (function(h)[0] * cotangent).sum()  # noqa: E731
        found = list(shapes(jax.make_jaxpr(jax.value_and_grad(loss))(hidden).jaxpr))
        return max(int(np.prod(s)) // VOCAB for s in found if VOCAB in s)

    assert largest(lambda h: completion_logprobs(h, kernel, targets, 1.0, 6)) <= max(6, WIDTH)
    assert largest(lambda h: dense(h, kernel, targets, 1.0)) == ROWS * TIME


def test_padding_does_not_change_what_the_student_says():
    student = tiny_student()
    module = merge(student.graphdef, student.lora, student.base)
    padded = sft_rows(6)
    logprobs, entropy, load = batch_logprobs(module, padded, 1.0, 16)
    assert load is None  # a student without experts
    for row in (0, 5):
        prompt, completion = padded.prompt_mask[row], padded.completion_mask[row]
        alone = TrainBatch(
            padded.prompt_tokens[row][prompt][None],
            jnp.ones((1, int(prompt.sum())), bool),
            padded.completion_tokens[row][completion][None],
            jnp.ones((1, int(completion.sum())), bool),
            jnp.zeros(1),
            jnp.zeros((1, int(completion.sum()))),
            jnp.int32(1),
        )
        for whole, single in zip(
            (logprobs, entropy), batch_logprobs(module, alone, 1.0, 16)[:2], strict=True
        ):
            np.testing.assert_allclose(whole[row][completion], single[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(logprobs).all()


def test_the_logprobs_program_covers_all_microbatches_and_zeroes_padding():
    student, batch = tiny_student(), sft_rows(6, microbatch=4)
    module = merge(student.graphdef, student.lora, student.base)
    logprobs, entropy = make_logprobs_fn(student, TrainConfig(microbatch_size=4), 0.7)(
        student.lora, student.base, batch
    )
    expected, spread, _ = batch_logprobs(module, batch, 0.7, 1000)
    mask = batch.completion_mask
    np.testing.assert_allclose(logprobs, np.where(mask, expected, 0.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, np.where(mask, spread, 0.0), rtol=1e-4, atol=1e-5)
    assert batch.rows == 8
    assert TINY.vocab_size == module.head_kernel().shape[1]
