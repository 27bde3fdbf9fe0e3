"""Attention on NVIDIA GPUs: cuDNN's flash attention, through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

import re
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cosr_jax.student.blockwise import Like, Places
from cosr_jax.student.layers import Window

#: cuDNN takes head sizes that are multiples of this, and masks over an even number of tokens.
_LANES = 8


def serves(q: Like, k: Like, sinks: jax.Array | None) -> bool:
    """Whether this GPU's cuDNN takes such arrays, forward and backward.

    JAX and cuDNN raise where it does not: flash attention wants 16-bit floats, Ampere or later, and
    heads of at most 128 numbers, from Hopper on 256.
    """
    capability = _compute_capability()
    width = q.shape[-1] + (0 if sinks is None else _LANES)
    return (
        q.dtype == jnp.bfloat16
        and capability >= (8, 0)
        and width % _LANES == 0
        and width <= (256 if capability >= (9, 0) else 128)
        and q.shape[1] % 2 == k.shape[1] % 2 == 0
    )


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Places,
    keys: Places,
    window: Window | None = None,
    sinks: jax.Array | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal softmax attention within segments, of queries that are the last of the keys.

    cuDNN keeps no scores; who sees whom goes to it as one array [batch, 1, time, keys] of q's
    dtype for all heads.

    Args:
      q: [batch, time, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim].
      v: same.
      queries: where the queries stand; padding sees itself only.
      keys: where the keys stand.
      window: how far the layer sees back; None: everything.
      sinks: float32 [heads], logits of an imaginary key whose value is zero; None: no such key.
      implementation: "xla" keeps all scores, and runs on any backend.

    Returns:
      [batch, time, heads, head_dim] in q's dtype.
    """
    head_dim = q.shape[-1]
    # The mask says so already, but lets cuDNN compute what it hides; keys that come before or
    # after the queries' own are not where cuDNN's triangle has them.
    is_causal = q.shape[1] == k.shape[1] and sinks is None
    mask = seen(queries, keys, None if window is None else window.tokens)
    if sinks is not None:
        q, k, v, mask = _with_sinks(q, k, v, mask, sinks)
    q, k, v = (checkpoint_name(x, "attention") for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        mask=mask,
        scale=head_dim**-0.5,
        is_causal=is_causal,
        implementation=implementation,
    )
    return out[..., :head_dim]


def seen(queries: Places, keys: Places, window: jax.Array | None = None) -> jax.Array:
    """bool [batch, 1, time, keys]: may query i see key j, where queries are the last of the keys?

    Itself and earlier ones of its own segment, less than ``window`` positions back.  Padding
    (segment 0) sees itself only, so that no softmax is over nothing.
    """
    time, total = queries.segments.shape[1], keys.segments.shape[1]
    rows, columns = jnp.arange(total - time, total)[:, None], jnp.arange(total)[None, :]
    mine, theirs = queries.segments[:, :, None], keys.segments[:, None, :]
    allowed = (mine == theirs) & (mine > 0) & (columns <= rows)[None]
    if window is not None:
        back = queries.positions[:, :, None] - keys.positions[:, None, :]
        allowed = allowed & (back < window)
    return (allowed | (columns == rows)[None])[:, None]


def _with_sinks(q, k, v, mask, sinks):
    """Sinks as a key: heads grow by numbers of which only it and the queries have the first.

    Not as a bias, which would be an array over heads x time x keys.  A second key, seen by
    nobody, keeps their number even.
    """
    features, more = [(0, 0)] * 3 + [(0, _LANES)], [(0, 0), (0, 2), (0, 0), (0, 0)]
    logits = (sinks * q.shape[-1] ** 0.5).astype(q.dtype)[None, None, :]
    column, time = q.shape[-1], k.shape[1]
    q = jnp.pad(q, features).at[..., column].set(jnp.broadcast_to(logits, q.shape[:-1]))
    k, v = (jnp.pad(jnp.pad(x, features), more) for x in (k, v))
    k = k.at[:, time, :, column].set(1)
    mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, 2)]).at[..., time].set(True)
    return q, k, v, mask


def _compute_capability() -> tuple[int, int]:
    """Of this process's GPUs, e.g. (9, 0) for Hopper; (0, 0) if they are not NVIDIA's."""
    name = getattr(jax.local_devices()[0], "compute_capability", "")
    found = re.fullmatch(r"(\d+)\.(\d+)", name)
    return (int(found[1]), int(found[2])) if found else (0, 0)
