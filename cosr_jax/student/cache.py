"""The cache of keys and values, and attention of new tokens to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.unstacked import Stack, at_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens.

    Rows are decoded in places, as many in each: row r in place r // (rows / places).  A prompt is
    kept once for all rows of its place, which read it as one matrix.

    Generated tokens of one step go to one column of all rows, whenever these began.  Columns are
    used in turn, over and over, so there must be as many as a row has tokens; ``positions`` tells
    which are a row's own.
    """

    prompt_k: Stack  # layers of [places, kv_heads, head_dim, prompt columns]
    prompt_v: Stack  # layers of [places, kv_heads, prompt columns, head_dim]
    prompt_positions: jax.Array  # int32 [places, prompt columns]; -1 on padding
    k: Stack  # layers of [rows, kv_heads, head_dim, columns]
    v: Stack  # layers of [rows, kv_heads, columns, head_dim]
    positions: jax.Array  # int32 [rows, columns]; -1 where no token of the row is

    @classmethod
    def empty(
        cls,
        model: ModelConfig,
        rows: int,
        places: int,
        width: int,
        columns: int,
        dtype: Any,
        unstacked: bool,
    ) -> KVCache:
        """A cache without tokens.

        Args:
          model: shape of the student.
          rows: decoded at once.
          places: of prompts; they divide ``rows``.
          width: columns of a prompt.
          columns: most generated tokens of a row.
          dtype: of keys and values.
          unstacked: one array a layer, see ``unstacked``.
        """
        heads, size, layers = model.num_key_value_heads, model.head_dim, model.num_hidden_layers

        def zeros(*shape: int) -> Stack:
            if unstacked:
                return tuple(jnp.zeros(shape, dtype) for _ in range(layers))
            return jnp.zeros((layers, *shape), dtype)

        return cls(
            prompt_k=zeros(places, heads, size, width),
            prompt_v=zeros(places, heads, width, size),
            prompt_positions=jnp.full((places, width), -1, jnp.int32),
            k=zeros(rows, heads, size, columns),
            v=zeros(rows, heads, columns, size),
            positions=jnp.full((rows, columns), -1, jnp.int32),
        )

    def append(
        self, k: jax.Array, v: jax.Array, positions: jax.Array, column: jax.Array
    ) -> KVCache:
        """With a step's tokens at ``column``.

        Args:
          k: [layers, rows, kv_heads, head_dim].
          v: same.
          positions: int32 [rows].
          column: int32 scalar.
        """

        def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), column, axis)

        def write_layers(stack: Stack, new: jax.Array, axis: int) -> Stack:
            # All layers at once, after the scan over them: inside it, the cache would be copied.
            if isinstance(stack, tuple):
                return tuple(write(old, one, axis) for old, one in zip(stack, new, strict=True))
            return write(stack, new, axis + 1)

        return dataclasses.replace(
            self,
            k=write_layers(self.k, k[..., None], 3),
            v=write_layers(self.v, v[:, :, :, None], 2),
            positions=write(self.positions, positions[:, None], 1),
        )


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    position: jax.Array,
    window: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of one new token a row to its prompt, to its tokens so far, and to itself.

    Written as products with prompts, generated tokens and the new one, under one softmax: a generic
    attention call would need the prompt's keys repeated for every row, and the new token's in the
    cache before.

    Args:
      q: [rows, heads, head_dim].
      k: [rows, kv_heads, head_dim], the new token's key.
      v: same, its value.
      cache: of all layers, without the new token.
      layer: int32 scalar.
      position: int32 [rows], the new token's.
      window: int32 scalar; tokens that it sees back, itself included.  None: all.
      sinks: float32 [heads]; logits of a key that takes weight and adds nothing.  None: no such.

    Returns:
      [rows, heads, head_dim].
    """
    rows, num_heads, head_dim = q.shape
    kv_heads, places = k.shape[1], cache.prompt_positions.shape[0]
    q = q.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)

    def by_place(x: jax.Array) -> jax.Array:
        return x.reshape(places, rows // places, *x.shape[1:])

    def is_seen(positions: jax.Array) -> jax.Array:
        back = position[:, None] - positions
        seen = positions >= 0
        return (seen if window is None else seen & (back < window))[:, None, None]

    def scores(keys: jax.Array, q: jax.Array, axes: str) -> jax.Array:
        return jnp.einsum(axes, q, keys.astype(q.dtype), preferred_element_type=jnp.float32)

    def mix(values: jax.Array, weights: jax.Array, axes: str) -> jax.Array:
        return jnp.einsum(axes, weights, values.astype(q.dtype))

    prompt_positions = jnp.repeat(cache.prompt_positions, rows // places, axis=0)
    to_prompt = at_layer(
        cache.prompt_k, layer, lambda keys, q: scores(keys, q, "psgqh,pghc->psgqc"), by_place(q)
    ).reshape(rows, kv_heads, -1, prompt_positions.shape[1])
    to_own = at_layer(cache.k, layer, lambda keys, q: scores(keys, q, "rgqh,rghc->rgqc"), q)
    parts = [
        jnp.where(is_seen(prompt_positions), to_prompt, -jnp.inf),
        jnp.where(is_seen(cache.positions), to_own, -jnp.inf),
        scores(k, q, "rgqh,rgh->rgq")[..., None],
    ]
    parts = [part * head_dim**-0.5 for part in parts]
    if sinks is not None:
        shape = (*to_own.shape[:-1], 1)
        parts.append(jnp.broadcast_to(sinks.reshape(1, kv_heads, -1, 1), shape))
    weights = jax.nn.softmax(jnp.concatenate(parts, -1), -1).astype(q.dtype)
    widths = [prompt_positions.shape[1], cache.positions.shape[1], 1]
    on_prompt, on_own, on_new = (
        weights[..., end - width : end]
        for width, end in zip(widths, (sum(widths[: i + 1]) for i in range(3)), strict=True)
    )
    out = at_layer(
        cache.prompt_v,
        layer,
        lambda values, w: mix(values, w, "psgqc,pgch->psgqh"),
        by_place(on_prompt),
    ).reshape(q.shape)
    out = out + at_layer(
        cache.v, layer, lambda values, w: mix(values, w, "rgqc,rgch->rgqh"), on_own
    )
    out = out + on_new * v[:, :, None]
    return out.reshape(rows, num_heads, head_dim)
