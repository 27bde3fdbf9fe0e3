"""Self-attention of whole sequences, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax.student.layers import LayerContext, Linear, rotate
from cosr_jax.student.shape import ModelConfig


class Attention(nnx.Module):
    """Grouped-query causal attention (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear]):
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        d, q, kv = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        self.q_proj = make_linear("attn.q_proj", d, q, ("embed", "heads"))
        self.k_proj = make_linear("attn.k_proj", d, kv, ("embed", "kv_heads"))
        self.v_proj = make_linear("attn.v_proj", d, kv, ("embed", "kv_heads"))
        self.o_proj = make_linear("attn.o_proj", q, d, ("heads", "embed"))

    def __call__(self, x, context: LayerContext, keys: list[Any], attend):
        """``attend(q, k, v) -> [batch, time, heads, head_dim]``; also returns k and v."""
        batch, time, _ = x.shape

        def heads(linear: Linear, number: int, key: Any) -> jax.Array:
            return linear(x, context.adapters, key).reshape(batch, time, number, self.head_dim)

        q = rotate(heads(self.q_proj, self.num_heads, keys[0]), context.cos, context.sin)
        k = rotate(heads(self.k_proj, self.num_kv_heads, keys[1]), context.cos, context.sin)
        v = heads(self.v_proj, self.num_kv_heads, keys[2])
        out = attend(q, k, v).reshape(batch, time, -1)
        return self.o_proj(out, context.adapters, keys[3]), (k, v)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """bool [batch, 1, time, time]: may query i see key j?  Same segment and j <= i.

    Padding (segment 0) sees itself only, so that no softmax is over nothing.
    """
    time = segment_ids.shape[1]
    rows, columns = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = (segment_ids > 0)[:, :, None]
    allowed = jnp.where(real, same & (columns <= rows)[None], (columns == rows)[None])
    return allowed[:, None]
