"""cuDNN's attention: who sees whom, when it serves, and that it is in programs for GPUs.

No GPU is needed: programs are lowered for CUDA, not compiled.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo

from cosr_jax import sharding
from cosr_jax.config import MeshConfig
from cosr_jax.student import cudnn, kernels
from cosr_jax.student.attention import attend_group
from cosr_jax.student.blockwise import Places
from cosr_jax.student.layers import Window

ROWS, GROUP, TIME, PROMPT, HEADS, KV_HEADS, WIDTH = 4, 2, 16, 8, 4, 2, 16


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=2, max_size=2),
    st.sampled_from([2, 6]),
    st.integers(1, 6),
)
@settings(max_examples=30)
def test_who_sees_whom_equals_its_definition(segments, time, window):
    segments = np.array(segments)
    positions = np.broadcast_to(np.arange(6), segments.shape)
    keys = Places(jnp.asarray(segments), jnp.asarray(positions))
    queries = jax.tree.map(lambda x: x[:, 6 - time :], keys)
    mask = np.asarray(cudnn.seen(queries, keys, window))
    assert mask.shape == (len(segments), 1, time, 6)
    for b, i, j in np.ndindex(len(segments), time, 6):
        own = 6 - time + i
        is_seen = segments[b, own] == segments[b, j] and j <= own and own - j < window
        assert mask[b, 0, i, j] == (is_seen if segments[b, own] else own == j)


def arrays(dtype, time: int = TIME) -> tuple:
    """Queries, keys, values and places of prompts with their completions."""
    like, prompts = jax.ShapeDtypeStruct, ROWS // GROUP
    q = like((prompts, PROMPT + GROUP * time, HEADS, WIDTH), dtype)
    k = like((*q.shape[:2], KV_HEADS, WIDTH), dtype)
    where = like(q.shape[:2], jnp.int32)
    return q, k, k, Places(where, where)


def fused_calls(dtype, time: int = TIME, sinks: bool = False) -> list[tuple[str, str, str]]:
    """Name, kind of mask and queries' type of the calls of cuDNN in a gradient of attention.

    Of prompts to themselves, and of completions to themselves and their shared prompt.
    """

    def attention(q, k, v, places, window, sinks):
        out = attend_group(q, k, v, places, PROMPT, ROWS, window, sinks)
        return out.astype(jnp.float32).sum()

    window = Window(jax.ShapeDtypeStruct((), jnp.int32), 8)
    sunk = jax.ShapeDtypeStruct((HEADS,), jnp.float32) if sinks else None
    gradient = jax.jit(jax.grad(attention, argnums=(0, 1, 2)))
    traced = gradient.trace(*arrays(dtype, time), window, sunk)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = r"__cudnn\$fmhaScaleBiasSoftmax(\w*)\(.*mask_type\\22: \\22(\w+)\\.*: \(tensor<(\w+)>"
    return re.findall(call, text)


def test_a_kernel_sees_shared_prompts_as_blocks_do(monkeypatch):
    """In value and gradient; windows end in the prompt."""
    *like, _ = arrays(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, x.shape) for key, x in zip(keys, like, strict=True)]
    past = jnp.ones((ROWS // GROUP, PROMPT), jnp.int32).at[0, :3].set(0)
    own = jnp.ones((ROWS, TIME), jnp.int32).at[1, -4:].set(0)
    starts = jnp.repeat(past.sum(1, keepdims=True), GROUP, axis=0)
    positions = jnp.maximum(past.cumsum(1) - 1, 0), starts + own.cumsum(1) - 1
    places = Places(
        *(
            jnp.concatenate([before, after.reshape(len(before), -1)], axis=1)
            for before, after in ((past, own), positions)
        )
    )
    is_real = (places.segments > 0)[..., None, None]

    def total(inputs):
        window = Window(jnp.int32(12), 12)
        out = attend_group(*inputs, places, PROMPT, ROWS, window, jnp.arange(4.0) - 1)
        return (out * jnp.where(is_real, inputs[0][..., :1], 0)).sum()

    blocks = jax.jit(jax.value_and_grad(total))(inputs)
    at_once = functools.partial(cudnn.cudnn_attention, implementation="xla")
    monkeypatch.setattr(kernels, "choose", lambda *_: at_once)
    by_kernel = jax.jit(jax.value_and_grad(lambda inputs: total(inputs)))(inputs)
    for mine, other in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(blocks), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "_compute_capability", lambda: (8, 0))
    # It asks the library, which is not here.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(("sinks", "width"), [(False, 16), (True, 24)])
def test_programs_for_gpus_attend_by_cudnn_forward_and_backward(ampere, sinks, width):
    prompts = f"{ROWS // GROUP}x{PROMPT}x{HEADS}x{width}xbf16"
    completions = f"{ROWS}x{TIME}x{HEADS}x{width}xbf16"
    mask = "NO_MASK" if sinks else "CAUSAL"  # beside the mask that is an array
    assert sorted(fused_calls(jnp.bfloat16, sinks=sinks)) == sorted(
        (way, *call)
        for way in ("", "Backward")
        for call in ((mask, prompts), ("NO_MASK", completions))
    )


def test_each_gpu_of_a_mesh_attends_for_its_rows_and_heads(ampere):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 4))):  # more chips than key-value heads
        calls = fused_calls(jnp.bfloat16)
    assert len(calls) == 4
    ends = f"{HEADS // 4}x{WIDTH}xbf16"
    assert {shape for *_, shape in calls} == {
        f"{ROWS // GROUP // 2}x{PROMPT}x{ends}",
        f"{ROWS // 2}x{TIME}x{ends}",
    }


@pytest.mark.parametrize(("dtype", "time"), [(jnp.float32, TIME), (jnp.bfloat16, TIME - 1)])
def test_what_cudnn_does_not_take_goes_in_blocks(ampere, dtype, time):
    assert fused_calls(dtype, time) == []


@pytest.mark.parametrize(
    ("capability", "width", "sinks", "serves"),
    [
        ((0, 0), 64, False, False),  # not NVIDIA's
        ((7, 5), 64, False, False),
        ((8, 0), 128, False, True),
        ((8, 0), 128, True, False),
        ((8, 9), 256, False, False),
        ((9, 0), 256, False, True),
        ((9, 0), 60, False, False),
    ],
)
def test_cudnn_serves_what_the_chip_can(monkeypatch, capability, width, sinks, serves):
    monkeypatch.setattr(cudnn, "_compute_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, 16, 2, width), jnp.bfloat16)
    assert cudnn.serves(q, q, jnp.zeros(2) if sinks else None) == serves


@pytest.mark.parametrize(
    ("name", "capability"), [("9.0", (9, 0)), ("12.0", (12, 0)), ("gfx942", (0, 0))]
)
def test_compute_capability_is_read_from_the_device(monkeypatch, name, capability):
    class Gpu:
        compute_capability = name

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    assert cudnn._compute_capability() == capability
