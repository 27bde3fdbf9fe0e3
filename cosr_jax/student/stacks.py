"""Stacks of bfloat16 arrays, cut by a loop on a CPU.

XLA's CPU backend has neither slices nor updates of bfloat16: it widens a whole stack to float32 to
read one slice, and widens and narrows all of it to write one.  So on a CPU what a loop slices are
the same bits as uint16, and what it stacks up is float32, which holds every bfloat16 exactly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cosr_jax import sharding


def sliceable(stacks: Any) -> Any:
    """A tree of arrays as a loop should slice them; ``sliced`` makes numbers of the slices."""
    if sharding.platform() != "cpu":
        return stacks

    def words(x: jax.Array) -> jax.Array:
        is_short = x.dtype == jnp.bfloat16
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_short else x

    return jax.tree.map(words, stacks)


def sliced(slices: Any) -> Any:
    """The numbers again; no weight is of uint16 itself."""

    def numbers(x: jax.Array) -> jax.Array:
        is_word = x.dtype == jnp.uint16
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if is_word else x

    return jax.tree.map(numbers, slices)


def stackable(values: Any) -> Any:
    """A tree of what a loop stacks up, or carries: the backward pass finds that in a stack."""
    if sharding.platform() != "cpu":
        return values

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(widen, values)


def kept(x: jax.Array, name: str) -> jax.Array:
    """``x``, which policies of rematerialisation know as ``name`` and may keep in a stack."""
    return checkpoint_name(stackable(x), name).astype(x.dtype)
