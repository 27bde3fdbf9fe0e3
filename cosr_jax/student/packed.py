"""Keys and values in eight bits: half the memory of bfloat16, a quarter of float32's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Integers with a scale for each vector, in the place of an array of a cache."""

    values: jax.Array  # int8
    scale: jax.Array  # float32; 1 along the vectors' axis

    def astype(self, dtype: Any) -> jax.Array:
        """The numbers that are meant, nearly."""
        return (self.values * self.scale).astype(dtype)


#: What a cache keeps keys or values in.
Packed = jax.Array | Int8


def zeros(shape: tuple[int, ...], dtype: Any, axis: int) -> Packed:
    """Zeros; int8 gets scales for vectors along ``axis``, which counts from the end."""
    if dtype != jnp.int8:
        return jnp.zeros(shape, dtype)
    of_vectors = list(shape)
    of_vectors[axis] = 1
    return Int8(jnp.zeros(shape, dtype), jnp.zeros(of_vectors, jnp.float32))


def pack(x: jax.Array, like: Packed, axis: int) -> Packed:
    """``x`` in the form of ``like``.

    In eight bits, the largest number of a vector is 127 and the others are rounded to the nearest
    127th of it (as LLM.int8() does, arXiv:2208.07339, section 2.1, vector by vector).
    """
    if not isinstance(like, Int8):
        return x.astype(like.dtype)
    scale = jnp.max(jnp.abs(x), axis, keepdims=True).astype(jnp.float32) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1))
    return Int8(values.astype(jnp.int8), scale)
