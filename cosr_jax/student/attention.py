"""Self-attention of whole sequences, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax.student import kernels
from cosr_jax.student.blockwise import (
    Places,
    blockwise_attention,
    heads_first,
    join,
    time_first,
)
from cosr_jax.student.layers import LayerContext, LayerKind, Linear, RMSNorm, Window, together
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

        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (
            out.reshape(batch, time, -1, self.head_dim)
            for out in together(projections, x, context.adapters, keys[:3])
        )
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
    q, where = heads_first(q, k.shape[2]), jax.tree.map(_all_heads, places)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    tokens = None if window is None else window.tokens
    out = blockwise_attention(q, k, v, where, where, tokens, causal=True)
    return time_first(_sink(*out, sinks))


def attend_group(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    prompt: int,
    rows: int,
    window: Window | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """``attend`` of prompts and of the completions that share them, each of which sees its prompt.

    A kernel gets the prompt's keys once more for each of its rows.  Elsewhere two softmaxes are
    joined into one: to the prompt, with the queries of a whole group as one sequence; and to the
    completion's own tokens.

    Args:
      q: [prompts, time, heads, head_dim]; a prompt and then its completions, one after the other.
      k: [prompts, time, kv_heads, head_dim].
      v: same.
      places: [prompts, time]; completions are of their prompt's segment and go on from there.
      prompt: tokens of each prompt.
      rows: completions of all prompts together, all of a length.
      window: as for ``attend``.
      sinks: as for ``attend``.

    Returns:
      [prompts, time, heads, head_dim].
    """
    prompts, kv_heads, group = q.shape[0], k.shape[2], rows // q.shape[0]
    length = (q.shape[1] - prompt) // group

    def completions(x: jax.Array) -> jax.Array:
        return x[:, prompt:].reshape(rows, length, *x.shape[2:])

    def with_prompt(x: jax.Array) -> jax.Array:
        shared = jnp.repeat(x[:, :prompt], group, axis=0)
        return jnp.concatenate([shared, completions(x)], axis=1)

    queries = jax.ShapeDtypeStruct((rows, length, *q.shape[2:]), q.dtype)
    keys = jax.ShapeDtypeStruct((rows, prompt + length, *k.shape[2:]), k.dtype)
    if kernel := kernels.choose(queries, keys, sinks):
        past_q, past_k, past_v, past = jax.tree.map(lambda x: x[:, :prompt], (q, k, v, places))
        shared = attend(past_q, past_k, past_v, past, window, sinks)
        own_q, own = jax.tree.map(completions, (q, places))
        k, v, where = jax.tree.map(with_prompt, (k, v, places))
        out = kernel(own_q, k, v, own, where, window, sinks)
        return jnp.concatenate([shared, out.reshape(prompts, -1, *out.shape[2:])], axis=1)

    def by_row(x: jax.Array) -> jax.Array:
        """Completions [prompts, kv_heads, group, length, ...] of [prompts, kv_heads, time, ...]."""
        return x[:, :, prompt:].reshape(*x.shape[:2], group, length, *x.shape[3:])

    q, k, v = heads_first(q, kv_heads), k.swapaxes(1, 2), v.swapaxes(1, 2)
    tokens, places = None if window is None else window.tokens, jax.tree.map(_all_heads, places)
    past_k, past_v, past = jax.tree.map(lambda x: x[:, :, :prompt], (k, v, places))
    seen, lse = blockwise_attention(q, past_k, past_v, places, past, tokens, causal=True)
    own_q, own_k, own_v, own = jax.tree.map(by_row, (q, k, v, places))
    to_own = blockwise_attention(own_q, own_k, own_v, own, own, tokens, causal=True)
    whole, whole_lse = join(to_own, (by_row(seen), by_row(lse)))
    out, lse = (
        jnp.concatenate([x[:, :, :prompt], y.reshape(x[:, :, prompt:].shape)], axis=2)
        for x, y in ((seen, whole), (lse, whole_lse))
    )
    return time_first(_sink(out, lse, sinks))


def _all_heads(places: jax.Array) -> jax.Array:
    """[batch, time] as ``blockwise_attention`` takes it where all heads' tokens stand alike."""
    return places[:, None]


def _sink(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The imaginary key takes its share of the softmax and gives nothing for it.

    Args:
      out: [batch, kv_heads, time, group, head_dim].
      lse: float32 [batch, kv_heads, time, group].
      sinks: float32 [heads], or None.
    """
    if sinks is None:
        return out
    sinks = sinks.reshape(1, out.shape[1], 1, -1)
    return out * jax.nn.sigmoid(lse - sinks)[..., None].astype(out.dtype)
