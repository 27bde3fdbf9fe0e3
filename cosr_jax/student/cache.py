"""The cache of keys and values, and attention of new tokens to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cosr_jax.student.packed import Packed, pack, zeros
from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.unstacked import Stack, at_layer

#: Where head_dim is, in the cache's keys and values.
KEY_AXIS, VALUE_AXIS = -2, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens.

    Rows are decoded in places, as many in each: row r in place r // (rows / places).  A prompt is
    kept once for all rows of its place, which read it as one matrix.

    A row's generated tokens go to columns 0, 1, ... whenever it began, so that not one bit of what
    it computes depends on when that was.  ``positions`` tells which columns it has filled.
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
          dtype: of keys and values; int8 keeps a scale for each vector beside.
          unstacked: one array a layer, see ``unstacked``.
        """
        heads, size, layers = model.num_key_value_heads, model.head_dim, model.num_hidden_layers

        def nothing(shape: tuple[int, ...], axis: int) -> Stack:
            if unstacked:
                return tuple(zeros(shape, dtype, axis) for _ in range(layers))
            return zeros((layers, *shape), dtype, axis)

        return cls(
            prompt_k=nothing((places, heads, size, width), KEY_AXIS),
            prompt_v=nothing((places, heads, width, size), VALUE_AXIS),
            prompt_positions=jnp.full((places, width), -1, jnp.int32),
            k=nothing((rows, heads, size, columns), KEY_AXIS),
            v=nothing((rows, heads, columns, size), VALUE_AXIS),
            positions=jnp.full((rows, columns), -1, jnp.int32),
        )

    def append(
        self, k: jax.Array, v: jax.Array, positions: jax.Array, column: jax.Array
    ) -> KVCache:
        """With a step's tokens.

        All layers are written at once, after the scan over them: inside it, the cache would be
        copied.

        Args:
          k: [layers, rows, kv_heads, head_dim].
          v: same.
          positions: int32 [rows].
          column: int32 [rows], where each row's token goes; nowhere if it is past the last.
        """
        here = jnp.arange(self.positions.shape[1])[None] == column[:, None]
        return dataclasses.replace(
            self,
            k=_write_layers(self.k, k[..., None], column, KEY_AXIS),
            v=_write_layers(self.v, v[:, :, :, None], column, VALUE_AXIS),
            positions=jnp.where(here, positions[:, None], self.positions),
        )


def _write_layers(stack: Stack, new: jax.Array, column: jax.Array, vectors: int) -> Stack:
    """Stacks [rows, kv_heads, ...] with ``new``, of one column, at each row's ``column``."""
    columns = -1 if vectors == KEY_AXIS else -2

    def sweep(old: jax.Array, new: jax.Array) -> jax.Array:
        # One device's CPU: a sweep over all columns costs no more than scattered writes there.
        shape = [1, 1, 1, 1]
        shape[columns] = old.shape[columns]
        here = jnp.arange(old.shape[columns]).reshape(shape) == column.reshape(-1, 1, 1, 1)
        return jnp.where(here, new, old)

    def scatter(old: jax.Array, new: jax.Array) -> jax.Array:
        rows = jnp.arange(column.shape[0])
        at = old.at[rows, :, :, column] if columns == -1 else old.at[rows, :, column]
        return at.set(jnp.squeeze(new, columns))

    if isinstance(stack, tuple):
        # The numbers are kept from becoming part of the programs, of which one then serves all
        # layers, where else each would have its own, and take its time to compile.
        numbers = jax.lax.optimization_barrier(tuple(jnp.uint32(i) for i in range(len(stack))))
        return tuple(
            jax.tree.map(
                sweep,
                old,
                pack(jax.lax.dynamic_index_in_dim(new, number, keepdims=False), old, vectors),
            )
            for old, number in zip(stack, numbers, strict=True)
        )
    return jax.tree.map(jax.vmap(scatter), stack, pack(new, stack, vectors))


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

    def scores(keys: Packed, q: jax.Array, axes: str) -> jax.Array:
        return jnp.einsum(axes, q, keys.astype(q.dtype), preferred_element_type=jnp.float32)

    def mix(values: Packed, weights: jax.Array, axes: str) -> jax.Array:
        values = values.astype(q.dtype)
        out = jnp.einsum(axes, weights, values, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    prompt_positions = jnp.repeat(cache.prompt_positions, rows // places, axis=0)

    # Batch axes first in the products: the CPU knows no bfloat16 product in another order.
    def past_scores(prompt: Packed, own: Packed, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        to_prompt = scores(prompt, by_place(q), "psgqh,pghc->pgsqc")
        return to_prompt, scores(own, q, "rgqh,rghc->rgqc")

    def past_mix(prompt: Packed, own: Packed, *weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_prompt = mix(prompt, by_place(weights[0]), "psgqc,pgch->pgsqh")
        return of_prompt, mix(own, weights[1], "rgqc,rgch->rgqh")

    to_prompt, to_own = at_layer([cache.prompt_k, cache.k], layer, past_scores, q)
    to_prompt = to_prompt.swapaxes(1, 2).reshape(rows, kv_heads, -1, prompt_positions.shape[1])
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
    values = [cache.prompt_v, cache.v]
    of_prompt, of_own = at_layer(values, layer, past_mix, on_prompt, on_own)
    out = of_prompt.swapaxes(1, 2).reshape(q.shape) + of_own
    out = out + on_new * v[:, :, None]
    return out.reshape(rows, num_heads, head_dim)
