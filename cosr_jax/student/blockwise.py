"""Attention in blocks of queries: no array over time x time is kept, and the future is skipped.

The generic formulation writes scores of all queries against all keys to memory, in float32, masks
half of them away, and keeps them for the backward pass.  Here a block of queries meets only the
keys up to its own end; its scores live no longer than the block; and the backward pass computes
them again from the log of the softmax's denominator (FlashAttention-2, arXiv:2307.08691, sections
2.3 and 3.1).  Written with products of [rows, head_dim] matrices, a key-value head's each, whose
rows are the queries in order with all heads of the group: so a block of them is contiguous, and
their keys are shared without a copy.  That is the form in which XLA's CPU backend is fast, and it
runs on every backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from cosr_jax.student.stacks import kept

#: The score of a key that may not be seen.  Finite, so that a query without any key has a weight
#: that vanishes beside every other part of its softmax, rather than no number.
HIDDEN_SCORE = -1e30
#: Blocks that a sequence is cut into, each compiled: with n of them, (n + 1) / 2n of the square is
#: computed.  Smaller ones than the least make slow products, larger ones than the most take memory.
_BLOCKS, _LEAST, _MOST = 8, 64, 512


#: What has a shape and a dtype.
Like = jax.Array | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand."""

    segments: jax.Array  # int32 [batch, time]; 0 is padding
    positions: jax.Array  # int32 [batch, time], counted from 0 in each segment


def heads_first(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, time, heads, head_dim] as ``blockwise_attention`` takes queries."""
    batch, time, heads, head_dim = x.shape
    return x.reshape(batch, time, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)


def time_first(x: jax.Array) -> jax.Array:
    """The inverse of ``heads_first``."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Places,
    keys: Places,
    window: jax.Array | None = None,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k / sqrt(head_dim)) v, where queries see the keys of their own segment.

    Parts of one softmax can be joined afterwards, by their log-sum-exps (``join``).  The axes
    before the last ones, here ``...``, say whose tokens these are: batch and kv_heads, as a rule.

    Args:
      q: [..., queries, group, head_dim]; the heads of a group share keys and values.
      k: [..., keys, head_dim].
      v: same.
      queries: where the queries stand, [..., queries] each, with 1 for axes where all stand alike.
      keys: where the keys stand, likewise.
      window: int32 scalar, how many tokens back a query sees, itself included; None: all.
      causal: the first queries are the keys themselves; query i sees keys 0..i only, and padding
        sees itself only.  A padding query that is no key sees nothing, and its output means
        nothing.

    Returns:
      [..., queries, group, head_dim] in q's dtype, and the logs of the softmax's denominators,
      float32 [..., queries, group].  Both carry gradients.
    """
    return _attention(q, k, v, queries, keys, window, causal)


def join(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One softmax out of its two parts over disjoint keys.

    Args:
      one: (out [..., head_dim], lse [...]) as ``blockwise_attention`` returns them.
      other: the same of the other keys.

    Returns:
      What attention to all keys at once would be: out, in the dtype of ``one``'s, and lse.
    """
    (out, lse), (other_out, other_lse) = one, other
    share = jax.nn.sigmoid(lse - other_lse)[..., None]
    joined = out * share + other_out * (1 - share)
    return joined.astype(out.dtype), jnp.logaddexp(lse, other_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, queries, keys, window, causal):
    return _forward(q, k, v, queries, keys, window, causal)


def _forward(q, k, v, queries, keys, window, causal):
    outs, lses = [], []
    for start, stop, seen in _blocks(q.shape[-3], k.shape[-2], causal):
        bias = _bias(queries, keys, window, start, stop, seen, causal)
        scores = _scores(_rows(q, start, stop), k[..., :seen, :], bias)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product(weights.astype(v.dtype), v[..., :seen, :]) / total
        outs.append(_groups(out.astype(q.dtype), q))
        lses.append(_groups(top + jnp.log(total), q))
    return jnp.concatenate(outs, -3), jnp.concatenate(lses, -3)[..., 0]


def _save(q, k, v, queries, keys, window, causal):
    q, k, v = (kept(x, "attention") for x in (q, k, v))
    out, lse = _forward(q, k, v, queries, keys, window, causal)
    out, lse = kept(out, "attention"), kept(lse, "attention")
    return (out, lse), (q, k, v, queries, keys, window, out, lse)


def _backward(causal, saved, cotangents):
    q, k, v, queries, keys, window, out, lse = saved
    pull, pull_lse = cotangents
    # d(score) = weight * (pull . v - own), where own gathers what the normalisation takes back.
    own = (pull.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - pull_lse
    pull_q = []
    # Gradients of keys and values are gathered as [.., head_dim, keys]: contracting the scores'
    # first axis would transpose them all; so only a [rows, head_dim] matrix is transposed.
    pull_k = jnp.zeros((*k.shape[:-2], k.shape[-1], k.shape[-2]), jnp.float32)
    pull_v = pull_k
    for start, stop, seen in _blocks(q.shape[-3], k.shape[-2], causal):
        rows, pull_rows = _rows(q, start, stop), _rows(pull, start, stop)
        bias = _bias(queries, keys, window, start, stop, seen, causal)
        scores = _scores(rows, k[..., :seen, :], bias)
        weights = jnp.exp(scores - _rows(lse[..., None], start, stop))
        along = _product_transposed(pull_rows, v[..., :seen, :])
        steep = weights * (along - _rows(own[..., None], start, stop))
        weights, steep = weights.astype(v.dtype), steep.astype(k.dtype)
        pull_q.append(_groups(_product(steep, k[..., :seen, :]), q))
        pull_k = pull_k.at[..., :seen].add(_product(rows.mT, steep))
        pull_v = pull_v.at[..., :seen].add(_product(pull_rows.mT, weights))
    scale = q.shape[-1] ** -0.5  # left to the end, where there are fewest numbers
    return (
        (jnp.concatenate(pull_q, -3) * scale).astype(q.dtype),
        (pull_k * scale).mT.astype(k.dtype),
        pull_v.mT.astype(v.dtype),
        None,
        None,
        None,
    )


_attention.defvjp(_save, _backward)


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, its end, keys that they can see) of every block.

    Where all queries see all keys, blocks only bound the memory, and each takes time to compile.
    """
    size = min(max(_LEAST, -(-keys // _BLOCKS)), _MOST)
    widest = max(_MOST, _MOST**2 // keys)
    start = 0
    while start < queries:
        sees_all = not causal or start + size >= keys
        stop = min(start + (widest if sees_all else size), queries)
        yield start, stop, keys if sees_all else stop
        start = stop


def _rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    """[..., queries, group, d] -> [..., rows, d]: a block's queries, each with all its heads."""
    return x[..., start:stop, :, :].reshape(*x.shape[:-3], -1, x.shape[-1])


def _groups(x: jax.Array, like: jax.Array) -> jax.Array:
    """[..., rows, d] -> [..., queries, group, d], the inverse of ``_rows``."""
    return x.reshape(*x.shape[:-2], -1, like.shape[-2], x.shape[-1])


def _bias(queries, keys, window, start, stop, seen, causal):
    """float32 [..., queries of the block, keys seen]: 0, or ``HIDDEN_SCORE`` where not allowed."""
    mine, theirs = queries.segments[..., start:stop, None], keys.segments[..., None, :seen]
    allowed = (mine == theirs) & (mine > 0)
    if window is not None:
        back = queries.positions[..., start:stop, None] - keys.positions[..., None, :seen]
        allowed = allowed & (back < window)
    if causal:
        ahead = jnp.arange(seen)[None, :] - jnp.arange(start, stop)[:, None]
        ahead = ahead.reshape(*[1] * (allowed.ndim - 2), *ahead.shape)
        # Tied to a batch's tokens: each comparison would be an array of its own outside all loops.
        allowed, ahead = jax.lax.optimization_barrier((allowed, ahead))
        allowed = (allowed & (ahead <= 0)) | (ahead == 0)
    return jnp.where(allowed, 0.0, HIDDEN_SCORE)


def _scores(rows, keys, bias):
    """float32 [..., rows, keys], biased; beside ``HIDDEN_SCORE`` a score is rounded away."""
    scores = _product_transposed(rows, keys)
    # Tied to what differs by layer: a scan would keep a bias for all heads, and read that.
    scores, bias = jax.lax.optimization_barrier((scores, bias))
    by_query = scores.reshape(*scores.shape[:-2], bias.shape[-2], -1, scores.shape[-1])
    return (by_query * rows.shape[-1] ** -0.5 + bias[..., None, :]).reshape(scores.shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 a b [..., n, k], of [..., n, m] and [..., m, k]."""
    return jnp.einsum("...nm,...mk->...nk", a, b, preferred_element_type=jnp.float32)


def _product_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 a b^T [..., n, k], of [..., n, m] and [..., k, m]."""
    return jnp.einsum("...nm,...km->...nk", a, b, preferred_element_type=jnp.float32)
