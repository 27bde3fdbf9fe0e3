"""Attention over the cache, in the dtypes that config offers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_fixtures import tiny_config

from cosr_jax.student.cache import KVCache, attend_cached
from cosr_jax.student.shape import ModelConfig

TINY = ModelConfig.from_hf(tiny_config("tiny_llama"))


@pytest.mark.parametrize("places", [1, 2, 4])
def test_prompts_are_attended_to_in_bfloat16_as_in_float32(places):
    """Also on a CPU, where XLA has no bfloat16 product for every order of axes."""
    rows, width = 4, 8
    keys = jax.random.split(jax.random.key(0), 5)
    heads, kv_heads, size = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim
    empty = KVCache.empty(TINY, rows, places, width, 4, jnp.float32, unstacked=False)
    cache = KVCache(
        jax.random.normal(keys[0], empty.prompt_k.shape),
        jax.random.normal(keys[1], empty.prompt_v.shape),
        jnp.tile(jnp.arange(width), (places, 1)),
        empty.k,
        empty.v,
        empty.positions,
    )
    q = jax.random.normal(keys[2], (rows, heads, size))
    k, v = (jax.random.normal(key, (rows, kv_heads, size)) for key in keys[3:])
    position = jnp.full(rows, width)

    def attended(dtype):
        layer = jnp.int32(0)
        out = jax.jit(attend_cached)(*(x.astype(dtype) for x in (q, k, v)), cache, layer, position)
        assert out.dtype == dtype
        return np.asarray(out, np.float32)

    np.testing.assert_allclose(attended(jnp.bfloat16), attended(jnp.float32), atol=0.05)
