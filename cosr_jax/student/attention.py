"""Self-attention of whole sequences, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax.student import kernels
from cosr_jax.student.blockwise import Places, blockwise_attention, join
from cosr_jax.student.layers import LayerContext, LayerKind, Linear, RMSNorm, Window
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
    window: Window | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention of whole sequences, by the platform's kernel if there is one.

    Args:
      q: [batch, time, heads, head_dim].
      k: [batch, time, kv_heads, head_dim].
      v: same.
      places: of the tokens; each sees earlier ones of its segment.  What padding sees, and its
        output, mean nothing.
      window: how far the layer sees back; None: everything.
      sinks: float32 [heads], logits of an imaginary key whose value is zero (gpt-oss; the same
        idea in arXiv:2309.17453); None for plain attention.

    Returns:
      [batch, time, heads, head_dim].
    """
    if kernel := kernels.choose(q, k, sinks):
        return kernel(q, k, v, places, places, window, sinks)
    tokens = None if window is None else window.tokens
    return _sink(*blockwise_attention(q, k, v, places, places, tokens, causal=True), sinks)


def attend_to_prompt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    prompt: tuple[jax.Array, jax.Array, Places],
    window: Window | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """``attend`` of completions, which also see the prompt that their group shares.

    A kernel gets the prompt's keys once more for each of its rows.  Elsewhere two softmaxes are
    joined into one: to the prompt, with the queries of a whole group as one sequence; and to the
    completion's own tokens.

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
    if kernel := kernels.choose(q, k, sinks):

        def with_past(past: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.repeat(past, len(own) // prompts, axis=0), own], axis=1)

        keys = jax.tree.map(with_past, past, places)
        return kernel(q, with_past(past_k, k), with_past(past_v, v), places, keys, window, sinks)

    def by_prompt(x: jax.Array) -> jax.Array:
        return x.reshape(prompts, -1, *x.shape[2:])

    tokens = None if window is None else window.tokens
    out, lse = blockwise_attention(
        by_prompt(q), past_k, past_v, jax.tree.map(by_prompt, places), past, tokens, causal=False
    )
    to_prompt = out.reshape(q.shape), lse.reshape(q.shape[:3])
    own = blockwise_attention(q, k, v, places, places, tokens, causal=True)
    return _sink(*join([own, to_prompt]), sinks)


def _sink(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The imaginary key takes its share of the softmax and gives nothing for it."""
    if sinks is None:
        return out
    return out * jax.nn.sigmoid(lse - sinks[None, None])[..., None].astype(out.dtype)
