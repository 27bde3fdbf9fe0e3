"""The TPU's attention kernel, interpreted on the CPU, equals the generic attention."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_fixtures import LORA, tiny_config

from cosr_jax import sharding
from cosr_jax.config import MeshConfig, StudentConfig
from cosr_jax.student import kernels, splash
from cosr_jax.student.blockwise import Places
from cosr_jax.student.cudnn import cudnn_attention
from cosr_jax.student.layers import Window
from cosr_jax.student.model import ModelConfig, abstract_student, merge
from cosr_jax.student.splash import splash_attention

TIME, PROMPT, HEADS, KV_HEADS, WIDTH = 130, 40, 4, 2, 8

at_once = functools.partial(cudnn_attention, implementation="xla")


def inputs(rows: int = 2) -> tuple:
    """Queries, keys, values, sinks and a cotangent; queries are the last of the keys."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, pull = (jax.random.normal(key, (rows, TIME, HEADS, WIDTH)) for key in keys[:2])
    k, v = (jax.random.normal(key, (rows, PROMPT + TIME, KV_HEADS, WIDTH)) for key in keys[2:])
    return q, k, v, jnp.arange(4.0) - 1, pull


def places(rows: int = 2) -> tuple[Places, Places]:
    """Of queries and keys: two packed segments, and a row padded on both sides."""
    segments = np.ones((rows, PROMPT + TIME), np.int32)
    segments[0, 95:] = 2
    segments[1, :9] = segments[1, -30:] = 0
    positions = np.broadcast_to(np.arange(PROMPT + TIME), segments.shape).copy()
    positions[0, 95:] -= 95
    keys = Places(jnp.asarray(segments), jnp.asarray(positions))
    return jax.tree.map(lambda x: x[:, PROMPT:], keys), keys


def value_and_gradients(attention):
    """Of real tokens' outputs, by queries, keys, values and sinks."""

    @jax.jit
    def run(q, k, v, sinks, pull, queries, keys, tokens):
        def value(q, k, v, sinks):
            out = attention(q, k, v, queries, keys, Window(tokens, 24), sinks)
            out = jnp.where((queries.segments > 0)[..., None, None], out, 0)
            return (out * pull).sum(), out

        (_, out), pulls = jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
        return out, *pulls

    return run


def test_kernel_and_generic_attention_agree_in_value_and_gradient():
    """With a window and without; grouped heads, sinks, packed rows, lengths that are no blocks."""
    kernel = value_and_gradients(functools.partial(splash_attention, interpret=True))
    generic = value_and_gradients(at_once)
    near, far = (
        (kernel(*arguments), generic(*arguments))
        for tokens in (24, 2**31 - 1)
        for arguments in [(*inputs(), *places(), jnp.int32(tokens))]
    )
    for found, expected in (near, far):
        for mine, other in zip(found, expected, strict=True):
            assert np.abs(other).max() > 0.1
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    assert np.abs(near[0][0] - far[0][0]).max() > 0.1


def test_chips_share_rows_and_heads():
    """Four chips to two key-value heads, which are repeated."""
    arguments = (*inputs(), *places(), jnp.int32(24))
    whole = value_and_gradients(at_once)(*arguments)
    shared = value_and_gradients(functools.partial(kernels.by_share, at_once))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 4))):
        parts = shared(*arguments)
    for mine, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_blocks_are_large_where_padding_is_small():
    sizes = {128: 128, 250: 256, 640: 128, 1000: 512, 1152: 384, 1664: 256, 4096: 512}
    assert {time: splash._block(time) for time in sizes} == sizes


@pytest.fixture
def for_tpus(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")


def test_a_kernel_serves_long_sequences_whose_rows_and_heads_divide(for_tpus):
    def is_served(rows: int, time: int, heads: int) -> bool:
        q = jax.ShapeDtypeStruct((rows, time, heads, WIDTH), jnp.float32)
        return kernels.choose(q, q, None) is not None

    assert is_served(1, 128, 3)
    assert not is_served(1, 127, 3)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2))):
        assert is_served(4, 128, 2)
        assert not is_served(3, 128, 2)
        assert not is_served(4, 128, 3)


@pytest.mark.parametrize("family", ["tiny_llama", "family_gpt_oss"])
@pytest.mark.parametrize(("remat", "forward"), [("layer", 2), ("mlp", 1)])
def test_rematerialisation_keeps_the_kernels_outcome_by_name(for_tpus, family, remat, forward):
    """A layer's program has the forward kernel once more where its outcome is not kept."""
    config = ModelConfig.from_hf(tiny_config(family))
    student = abstract_student(config, StudentConfig(remat=remat), LORA)

    def total(lora, base, tokens):
        return merge(student.graphdef, lora, base)(tokens, tokens, tokens).sum()

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    traced = jax.jit(jax.grad(total)).trace(student.lora, student.base, tokens)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = collections.Counter(re.findall(r'kernel_name = "splash_mha_(fwd|dq|dkv)_', program))
    kinds = 2 if config.sliding_layers else 1  # kernels of sliding layers, and of others
    assert found == {"fwd": kinds * forward, "dq": kinds, "dkv": kinds}
