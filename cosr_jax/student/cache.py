"""The cache of keys and values, and attention of new tokens to it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, in the compute dtype.

    A prompt is kept once for all samples of its group: decoding reads it as one matrix for the
    whole group, and memory grows with what was generated, not with prompts times samples.
    """

    prompt_k: jax.Array  # [layers, prompts, kv_heads, prompt columns, head_dim]
    prompt_v: jax.Array  # same
    prompt_mask: jax.Array  # bool [prompts, prompt columns]; False on padding
    k: jax.Array  # [layers, rows, kv_heads, columns, head_dim]; a column per generated token
    v: jax.Array  # same


def attend_cached(
    q: jax.Array,
    layer: KVCache,
    k: jax.Array,
    v: jax.Array,
    column: jax.Array,
    position: jax.Array,
    window: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of one new token a row to its prompt and to the tokens generated so far.

    Written as two products, prompt and generated, under one softmax: a generic attention call
    would need the prompt's keys repeated for every sample.

    Args:
      q: [rows, heads, head_dim].
      layer: one layer's cache, without the leading axis; the new token is not in it yet.
      k: [rows, kv_heads, head_dim], the new token's key.
      v: same, its value.
      column: int32 scalar; the new token's column.
      position: int32 [rows]; the new token's position.
      window: int32 scalar; tokens that it sees back, itself included.  None: all.
      sinks: float32 [heads]; logits of a key that takes weight and adds nothing.  None: no such.

    Returns:
      [rows, heads, head_dim].
    """
    rows, num_heads, head_dim = q.shape
    prompts, kv_heads, _, _ = layer.prompt_k.shape
    start = (0, 0, column, 0)
    keys = jax.lax.dynamic_update_slice(layer.k, k[:, :, None], start)
    values = jax.lax.dynamic_update_slice(layer.v, v[:, :, None], start)
    q = q.reshape(prompts, rows // prompts, kv_heads, num_heads // kv_heads, head_dim)
    to_prompt = jnp.einsum(
        "pskqh,pkch->pskqc", q, layer.prompt_k, preferred_element_type=jnp.float32
    )
    in_prompt = layer.prompt_mask[:, None, None, None, :]
    in_own = jnp.arange(keys.shape[2]) <= column
    if window is not None:
        key_position = jnp.cumsum(layer.prompt_mask, -1) - 1
        back = position.reshape(prompts, -1, 1) - key_position[:, None, :]
        in_prompt = in_prompt & (back < window)[:, :, None, None, :]
        in_own = in_own & (column - jnp.arange(keys.shape[2]) < window)
    to_prompt = jnp.where(in_prompt, to_prompt, -jnp.inf)
    by_row = (prompts, rows // prompts, *keys.shape[1:])
    to_own = jnp.einsum(
        "pskqh,pskch->pskqc", q, keys.reshape(by_row), preferred_element_type=jnp.float32
    )
    to_own = jnp.where(in_own, to_own, -jnp.inf)
    scores = jnp.concatenate([to_prompt, to_own], -1) * head_dim**-0.5
    if sinks is not None:
        sinks = sinks.reshape(1, 1, kv_heads, -1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(scores, -1).astype(q.dtype)
    width = to_prompt.shape[-1]
    on_prompt, on_own = weights[..., :width], weights[..., width : width + keys.shape[2]]
    out = jnp.einsum("pskqc,pkch->pskqh", on_prompt, layer.prompt_v)
    out = out + jnp.einsum("pskqc,pskch->pskqh", on_own, values.reshape(by_row))
    return out.reshape(rows, num_heads, head_dim)
