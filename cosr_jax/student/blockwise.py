"""Attention in blocks of queries: no array over time x time is kept, and the future is skipped.

The generic formulation writes scores of all queries against all keys to memory, in float32, masks
half of them away, and keeps them for the backward pass.  Here a block of queries meets only the
keys up to its own end; its scores live no longer than the block; and the backward pass computes
them again from the log of the softmax's denominator (FlashAttention-2, arXiv:2307.08691, sections
2.3 and 3.1).  Written with products of [rows, head_dim] matrices that are contiguous for every
(batch, key-value head), whose queries share their keys without a copy; that is the form in which
XLA's CPU backend is fast, and it runs on every backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from cosr_jax.student.stacks import kept

#: The score of a key that may not be seen.  Finite, so that a query without any key has a weight
#: that vanishes beside every other part of its softmax, rather than no number.
HIDDEN_SCORE = -1e30
#: Blocks that a sequence is cut into, each compiled: with n of them, (n + 1) / 2n of the square is
#: computed.  Smaller ones than the least make slow products, larger ones than the most take memory.
_BLOCKS, _LEAST, _MOST = 8, 64, 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand."""

    segments: jax.Array  # int32 [batch, time]; 0 is padding
    positions: jax.Array  # int32 [batch, time], counted from 0 in each segment


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

    Parts of one softmax can be joined afterwards, by their log-sum-exps (``join``).

    Args:
      q: [batch, queries, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim]; head h meets key-value head h // (heads / kv_heads).
      v: same.
      queries: where the queries stand.
      keys: where the keys stand.
      window: int32 scalar, how many tokens back a query sees, itself included; None: all.
      causal: query i sees keys 0..i only, and padding sees itself only; queries and keys are the
        same tokens.  Otherwise a padding query sees nothing, and its output means nothing.

    Returns:
      [batch, queries, heads, head_dim] in q's dtype, and the logs of the softmax's denominators,
      float32 [batch, queries, heads].  Both carry gradients.
    """
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    by_head = q.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    by_head, k, v = by_head.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out, lse = _attention(by_head, k, v, queries, keys, window, causal)
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, time, heads)


def join(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """One softmax out of its parts over disjoint keys.

    Args:
      parts: (out [..., head_dim], lse [...]) as ``blockwise_attention`` returns them.

    Returns:
      What attention to all keys at once would be: out, in the first part's dtype, and lse.
    """
    whole = functools.reduce(jnp.logaddexp, [lse for _, lse in parts])
    weighted = [out * jnp.exp(lse - whole)[..., None] for out, lse in parts]
    return functools.reduce(jnp.add, weighted).astype(parts[0][0].dtype), whole


# Inside: queries [batch, kv_heads, group, queries, head_dim]; keys [batch, kv_heads, keys, ...].


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, queries, keys, window, causal):
    return _forward(q, k, v, queries, keys, window, causal)


def _forward(q, k, v, queries, keys, window, causal):
    outs, lses = [], []
    for start, stop, seen in _blocks(q.shape[3], k.shape[2], causal):
        allowed = _allowed(queries, keys, window, start, stop, seen, causal)
        scores = _scores(_rows(q, start, stop), k[:, :, :seen], allowed)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bnqk,bnkd->bnqd", weights.astype(v.dtype), v[:, :, :seen]) / total
        outs.append(_groups(out.astype(q.dtype), q))
        lses.append(_groups(top + jnp.log(total), q))
    return jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)[..., 0]


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
    pull_k = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    pull_v = pull_k
    for start, stop, seen in _blocks(q.shape[3], k.shape[2], causal):
        rows, pull_rows = _rows(q, start, stop), _rows(pull, start, stop)
        allowed = _allowed(queries, keys, window, start, stop, seen, causal)
        scores = _scores(rows, k[:, :, :seen], allowed)
        weights = jnp.exp(scores - _rows(lse[..., None], start, stop))
        along = _product("bnqd,bnkd->bnqk", pull_rows, v[:, :, :seen])
        steep = weights * (along - _rows(own[..., None], start, stop)) * q.shape[-1] ** -0.5
        weights, steep = weights.astype(v.dtype), steep.astype(k.dtype)
        pull_q.append(_groups(_product("bnqk,bnkd->bnqd", steep, k[:, :, :seen]), q))
        more_k = _product("bndq,bnqk->bndk", rows.swapaxes(2, 3), steep)
        more_v = _product("bndq,bnqk->bndk", pull_rows.swapaxes(2, 3), weights)
        pull_k = pull_k.at[..., :seen].add(more_k)
        pull_v = pull_v.at[..., :seen].add(more_v)
    return (
        jnp.concatenate(pull_q, 3).astype(q.dtype),
        pull_k.swapaxes(2, 3).astype(k.dtype),
        pull_v.swapaxes(2, 3).astype(v.dtype),
        None,
        None,
        None,
    )


_attention.defvjp(_save, _backward)


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first query, its end, keys that they can see) of every block.

    Where all queries see all keys, blocks only bound the memory, and each takes time to compile.
    """
    size = min(max(_LEAST, -(-queries // _BLOCKS)), _MOST) if causal else _MOST
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield start, stop, stop if causal else keys


def _rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    """[b, n, group, queries, d] -> [b, n, rows, d]: a block's queries of all heads of a group."""
    block = x[:, :, :, start:stop]
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _groups(x: jax.Array, like: jax.Array) -> jax.Array:
    """[b, n, rows, d] -> [b, n, group, queries, d], the inverse of ``_rows``."""
    return x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[-1])


def _allowed(queries, keys, window, start, stop, seen, causal):
    """bool [batch, queries of the block, keys seen]."""
    mine, theirs = queries.segments[:, start:stop, None], keys.segments[:, None, :seen]
    allowed = (mine == theirs) & (mine > 0)
    if window is not None:
        back = queries.positions[:, start:stop, None] - keys.positions[:, None, :seen]
        allowed = allowed & (back < window)
    if not causal:
        return allowed
    rows, columns = jnp.arange(start, stop)[:, None], jnp.arange(seen)[None, :]
    return (allowed & (columns <= rows)[None]) | (columns == rows)[None]


def _scores(rows, keys, allowed):
    """float32 [b, n, rows, keys], ``HIDDEN_SCORE`` where not allowed."""
    scores = _product("bnqd,bnkd->bnqk", rows, keys) * rows.shape[-1] ** -0.5
    by_query = scores.reshape(*scores.shape[:2], -1, *allowed.shape[1:])
    return jnp.where(allowed[:, None, None], by_query, HIDDEN_SCORE).reshape(scores.shape)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
