"""Accelerators' own attention: which kernel serves, and each chip's share of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cosr_jax import sharding
from cosr_jax.student import cudnn, splash
from cosr_jax.student.blockwise import Like

#: ``(q, k, v, queries, keys, window, sinks) -> out``, as ``splash.splash_attention``.
Kernel = Callable[..., jax.Array]


def choose(q: Like, k: Like, sinks: jax.Array | None) -> Kernel | None:
    """The kernel for such arrays on the platform and mesh in context; None: there is none.

    Decided by what is known when a program is traced, so that the same program is the same work.

    Args:
      q: [batch, time, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim].
      sinks: of the heads, or None.
    """
    if q.shape[0] % _shards("batch") or q.shape[2] % _shards("heads"):
        return None
    platform = sharding.platform()
    if platform == "tpu" and splash.serves(q):
        return functools.partial(by_share, splash.splash_attention)
    if platform == "gpu" and cudnn.serves(q, k, sinks):
        return functools.partial(by_share, cudnn.cudnn_attention)
    return None


def by_share(kernel: Kernel, q, k, v, queries, keys, window, sinks) -> jax.Array:
    """``kernel`` on the mesh in context: rows by its batch axes, heads by its tensor axis.

    The compiler cannot divide a kernel's work by itself.  Key-value heads that the tensor axis
    does not divide are repeated until it does; a chip still holds no more than it needs.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, queries, keys, window, sinks)
    shards = _shards("kv_heads")
    copies = shards // math.gcd(shards, k.shape[2])
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    rows = sharding.partition_spec(("batch",))
    heads, kv_heads = (
        sharding.partition_spec(("batch", None, axis, None)) for axis in ("heads", "kv_heads")
    )
    share = jax.shard_map(
        kernel,
        in_specs=(
            *(heads, kv_heads, kv_heads),
            *(rows, rows),
            PartitionSpec(),
            sharding.partition_spec(("heads",)),
        ),
        out_specs=heads,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return share(q, k, v, queries, keys, window, sinks)


def _shards(axis: str) -> int:
    """Pieces that the mesh in context cuts a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(mesh_axis, 1) for mesh_axis in sharding.RULES[axis])
