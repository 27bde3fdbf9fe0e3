"""Blockwise attention against the generic one, which masks and keeps all scores."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.student import blockwise
from cosr_jax.student.attention import attend, attend_group
from cosr_jax.student.blockwise import Places, blockwise_attention, heads_first, join, time_first
from cosr_jax.student.cudnn import cudnn_attention
from cosr_jax.student.layers import Window

BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "_LEAST", 8)


def tokens(time: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(1), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return tuple(
        jax.random.normal(key, (BATCH, time, number, WIDTH))
        for key, number in zip(keys, heads, strict=True)
    )


def places(time: int) -> Places:
    """A row padded on both sides, and one with two packed segments."""
    segments = np.ones((BATCH, time), np.int32)
    segments[0, :3] = segments[0, -2:] = 0
    segments[1, time // 2 :] = 2
    positions = np.broadcast_to(np.arange(time), segments.shape).copy()
    positions[0] = np.maximum(positions[0] - 3, 0)
    positions[1, time // 2 :] -= time // 2
    return Places(jnp.asarray(segments), jnp.asarray(positions))


def attend_at_once(q, k, v, where, window=None, sinks=None):
    """JAX's own attention, which keeps all scores."""
    return cudnn_attention(q, k, v, where, where, window, sinks, implementation="xla")


def value_and_pulls(function, cotangent, *args):
    @jax.jit
    def both(*args):
        out, pull = jax.vjp(function, *args)
        return (out, *pull(cotangent))

    return both(*args)


@pytest.mark.parametrize(
    ("time", "window", "sinks"),
    [(5, None, False), (21, None, True), (64, 7, True)],
)
def test_values_and_gradients_equal_those_of_attention_at_once(time, window, sinks):
    q, k, v, cotangent = tokens(time)
    where = places(time)
    slides = None if window is None else Window(jnp.int32(window), window)
    sunk = jnp.linspace(-1.0, 2.0, HEADS) if sinks else None
    rest = where, slides, sunk
    ours = value_and_pulls(lambda q, k, v: attend(q, k, v, *rest), cotangent, q, k, v)
    theirs = value_and_pulls(lambda q, k, v: attend_at_once(q, k, v, *rest), cotangent, q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_a_softmax_joined_from_two_parts_is_the_softmax_over_both():
    """Two samples of one prompt, whose padded keys and absent queries must not matter."""
    time, new = 20, 9
    q, k, v, cotangent = tokens(time)
    prompt, completion = slice(0, time - new), slice(time - new, time)
    segments = jnp.ones((BATCH, time), jnp.int32).at[0, :4].set(0).at[1, -3:].set(0)
    positions = jnp.maximum(jnp.cumsum(segments, 1) - 1, 0)
    real = (segments[:, completion] > 0)[..., None, None]

    def at(part: slice) -> Places:
        return Places(segments[:, None, part], positions[:, None, part])

    def parts(q, k, v):
        q = heads_first(q[:, completion], KV_HEADS)
        (past_k, own_k), (past_v, own_v) = (
            (x[:, prompt].swapaxes(1, 2), x[:, completion].swapaxes(1, 2)) for x in (k, v)
        )
        here = at(completion)
        own = blockwise_attention(q, own_k, own_v, here, here, causal=True)
        past = blockwise_attention(q, past_k, past_v, here, at(prompt), causal=False)
        return time_first(join(past, own)[0]) * real

    def whole(q, k, v):
        return attend_at_once(q, k, v, Places(segments, positions))[:, completion] * real

    for mine, other in zip(
        value_and_pulls(parts, cotangent[:, completion], q, k, v),
        value_and_pulls(whole, cotangent[:, completion], q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_a_group_attends_as_each_of_its_rows_would_with_the_prompt_before_it(window):
    """Over several blocks of the prompt; prompts padded before, completions behind."""
    prompt, group, new = 21, 3, 5
    q, k, v, cotangent = tokens(prompt + group * new)
    rows = BATCH * group
    before = jnp.ones((BATCH, prompt), jnp.int32).at[0, :4].set(0)
    after = jnp.ones((rows, new), jnp.int32).at[1, -2:].set(0)
    lengths = before.sum(1, keepdims=True)
    past = jnp.maximum(jnp.arange(prompt)[None] - (prompt - lengths), 0)
    own = jnp.repeat(lengths, group, 0) + jnp.arange(new)[None]

    def joined(prompt, completions):
        return jnp.concatenate([prompt, completions.reshape(BATCH, -1)], axis=1)

    def by_row(x):
        shared, own = x[:, :prompt], x[:, prompt:].reshape(rows, new, *x.shape[2:])
        return jnp.concatenate([jnp.repeat(shared, group, 0), own], axis=1)

    where = Places(joined(before, after), joined(past, own))
    slides = None if window is None else Window(jnp.int32(window), window)
    sinks = jnp.linspace(-1.0, 2.0, HEADS)
    real = (where.segments > 0)[..., None, None]

    def together(q, k, v):
        return attend_group(q, k, v, where, prompt, rows, slides, sinks) * real

    def apart(q, k, v):
        each = jax.tree.map(by_row, (q, k, v, where))
        out = attend_at_once(*each, slides, sinks)
        completions = out[:, prompt:].reshape(BATCH, -1, HEADS, WIDTH)
        return jnp.concatenate([out[::group, :prompt], completions], axis=1) * real

    for mine, other in zip(
        value_and_pulls(together, cotangent, q, k, v),
        value_and_pulls(apart, cotangent, q, k, v),
        strict=True,
    ):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 9000), st.integers(0, 9000), st.booleans())
def test_blocks_cover_all_queries_and_what_they_see(keys, more, causal):
    queries = keys + more if causal else max(1, more)
    end = 0
    for start, stop, seen in blockwise._blocks(queries, keys, causal):
        assert start == end < stop
        assert seen == keys if not causal else min(stop, keys) <= seen <= keys
        assert (stop - start) * seen <= max(blockwise._MOST**2, blockwise._MOST * keys)
        end = stop
    assert end == queries


def test_neither_pass_holds_scores_of_all_tokens():
    time = 256
    q, k, v, cotangent = tokens(time)
    where = places(time)

    def largest(attention):
        program = jax.make_jaxpr(lambda *args: value_and_pulls(attention, cotangent, *args))
        text = program(q, k, v).pretty_print(use_color=False)
        shapes = [found.split(",") for found in re.findall(r":f32\[([\d,]+)\]", text)]
        return max(math.prod(map(int, shape)) for shape in shapes)

    square = BATCH * HEADS * time * time
    assert largest(lambda q, k, v: attend(q, k, v, where)) <= square / 8
    assert largest(lambda *x: attend_at_once(*x, where)) >= square
