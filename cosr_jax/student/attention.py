"""Self-attention of whole sequences, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax import sharding
from cosr_jax.student.blockwise import Places, blockwise_attention, join
from cosr_jax.student.layers import LayerContext, LayerKind, Linear, RMSNorm
from cosr_jax.student.shape import ModelConfig


class Attention(nnx.Module):
    """Grouped-query causal attention (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear], param_dtype: Any):
        layers = config.num_hidden_layers
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        d, q, kv = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        bias = config.qkv_bias
        self.q_proj = make_linear("attn.q_proj", d, q, ("embed", "heads"), bias)
        self.k_proj = make_linear("attn.k_proj", d, kv, ("embed", "kv_heads"), bias)
        self.v_proj = make_linear("attn.v_proj", d, kv, ("embed", "kv_heads"), bias)
        self.o_proj = make_linear("attn.o_proj", q, d, ("heads", "embed"), config.output_bias)
        self.normed, self.has_sinks = config.qk_norm, config.attention_sinks
        if self.normed:
            eps, offset = config.rms_norm_eps, config.norm_offset
            self.q_norm = RMSNorm(layers, self.head_dim, eps, param_dtype, offset)
            self.k_norm = RMSNorm(layers, self.head_dim, eps, param_dtype, offset)
        if self.has_sinks:
            sinks = jnp.zeros((layers, self.num_heads), param_dtype)
            self.sinks = nnx.Param(sinks, axes=("layers", "heads"))
        # Whoever attends divides by sqrt(head_dim); another divisor goes into the queries.
        self.query_scale = (self.head_dim / (config.query_scalar or self.head_dim)) ** 0.5

    def __call__(self, x, context: LayerContext, layer: LayerKind, keys: list[Any], attend):
        """``attend(q, k, v, window, sinks) -> [batch, time, heads, head_dim]``.

        ``window`` is the layer's (None: no layer slides), ``sinks`` float32 [heads] or None.
        Returns what goes to the residual stream, and k and v.
        """
        batch, time, _ = x.shape

        def heads(linear: Linear, number: int, key: Any) -> jax.Array:
            return linear(x, context.adapters, key).reshape(batch, time, number, self.head_dim)

        q = heads(self.q_proj, self.num_heads, keys[0])
        k = heads(self.k_proj, self.num_kv_heads, keys[1])
        v = heads(self.v_proj, self.num_kv_heads, keys[2])
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = context.rotate(q, layer), context.rotate(k, layer)
        if self.query_scale != 1.0:
            q = q * self.query_scale
        sinks = self.sinks[...].astype(jnp.float32) if self.has_sinks else None
        out = attend(q, k, v, layer.window, sinks).reshape(batch, time, -1)
        return self.o_proj(out, context.adapters, keys[3]), (k, v)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    window: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention of whole sequences, by what the platform does best.

    Args:
      q: [batch, time, heads, head_dim].
      k: [batch, time, kv_heads, head_dim].
      v: same.
      places: of the tokens; each sees earlier ones of its segment, and padding itself only.
      window: int32 scalar, how many tokens back attention sees, itself included; None: all.
      sinks: float32 [heads], logits of an imaginary key whose value is zero (gpt-oss; the same
        idea in arXiv:2309.17453); None for plain attention.

    Returns:
      [batch, time, heads, head_dim].
    """
    if sharding.platform() == "gpu":
        mask = within_window(causal_mask(places.segments), places.positions, window)
        return attend_at_once(q, k, v, mask, sinks)
    return _sink(*blockwise_attention(q, k, v, places, places, window, causal=True), sinks)


def attend_to_prompt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    prompt: tuple[jax.Array, jax.Array, Places],
    window: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """``attend`` of completions, which also see the prompt that their group shares.

    Two softmaxes joined into one: to the prompt, with the queries of a whole group as one
    sequence; and to the completion's own tokens.

    Args:
      q: [rows, time, heads, head_dim].
      k: [rows, time, kv_heads, head_dim].
      v: same.
      places: of the completions' tokens; positions go on from the prompt's.
      prompt: keys and values [prompts, prompt time, kv_heads, head_dim], and where they stand.
        Row i belongs to prompt i // (rows / prompts).
      window: as for ``attend``.
      sinks: as for ``attend``.

    Returns:
      [rows, time, heads, head_dim].
    """
    past_k, past_v, past = prompt
    prompts = past_k.shape[0]

    def by_prompt(x: jax.Array) -> jax.Array:
        return x.reshape(prompts, -1, *x.shape[2:])

    out, lse = blockwise_attention(
        by_prompt(q), past_k, past_v, jax.tree.map(by_prompt, places), past, window, causal=False
    )
    to_prompt = out.reshape(q.shape), lse.reshape(q.shape[:3])
    own = blockwise_attention(q, k, v, places, places, window, causal=True)
    return _sink(*join([own, to_prompt]), sinks)


def _sink(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The imaginary key takes its share of the softmax and gives nothing for it."""
    if sinks is None:
        return out
    return out * jax.nn.sigmoid(lse - sinks[None, None])[..., None].astype(out.dtype)


def attend_at_once(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sinks: jax.Array | None = None
) -> jax.Array:
    """``attend`` with a mask, bool [batch, 1, time, time], through JAX's own attention."""
    if sinks is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    time = k.shape[1]
    extra = [(0, 0), (0, 1), (0, 0), (0, 0)]
    is_extra = (jnp.arange(time + 1) == time).reshape(1, 1, 1, -1)
    bias = jnp.where(is_extra, sinks[None, :, None, None], 0.0)
    seen = jnp.pad(mask, [(0, 0), (0, 0), (0, 0), (0, 1)], constant_values=True)
    return jax.nn.dot_product_attention(
        q, jnp.pad(k, extra), jnp.pad(v, extra), bias.astype(q.dtype), seen
    )


def within_window(mask: jax.Array, positions: jax.Array, window: jax.Array | None) -> jax.Array:
    """``mask`` [batch, 1, time, time] without what lies ``window`` or more tokens back.

    ``positions`` [batch, time] count from 0 in each segment; None for ``window`` changes nothing.
    """
    if window is None:
        return mask
    back = positions[:, :, None] - positions[:, None, :]
    return mask & (back < window)[:, None]


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
