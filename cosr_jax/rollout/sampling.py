"""Drawing one token per row from logits, and the log-probability of what was drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

_BLOCK = 256


def seed_key(seed: int) -> np.ndarray:
    """uint32 [2]: the words of ``jax.random.key(seed)``, for seeds of up to 64 bits."""
    return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def row_keys(key: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two words, uint32 [rows] each, of ``jax.random.fold_in(key, row)`` for each row.

    Args:
      key: uint32 [2].
      row: int32 [rows].
    """
    return _threefry((key[0], key[1]), row)


def uniforms(keys: tuple[jax.Array, jax.Array], number: jax.Array) -> jax.Array:
    """float32 [rows] in [0, 1): ``jax.random.uniform(fold_in(key, number))`` for each row.

    To the last bit what those calls give under vmap, with fewer kernels to compile: written as the
    blocks of Threefry-2x32 that they are (Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3", 2011).

    Args:
      keys: of the rows, from ``row_keys``.
      number: int32 [rows].
    """
    high, low = _threefry(_threefry(keys, number), jnp.zeros_like(number))
    # 23 random bits behind the exponent of 1 give a number in [1, 2).
    bits = (high ^ low) >> 9 | np.float32(1).view(np.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0


def _threefry(key: tuple[jax.Array, jax.Array], low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks of the counters (0, low), uint32 [rows] each."""
    words = low.astype(jnp.uint32)
    high, low = threefry2x32_p.bind(*key, jnp.zeros_like(words), words)
    return high, low


def truncate(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets logits outside the top-k and the nucleus to -inf.

    The nucleus (arXiv:1904.09751) is the smallest set of likeliest tokens whose probability reaches
    ``top_p``; it is taken after top-k.  Ties are broken by token id, so exactly k tokens stay.

    Args:
      logits: float32 [rows, vocab], already divided by the temperature.
      top_p: float32 scalar in (0, 1]; 1 keeps all.
      top_k: int32 scalar; 0 keeps all.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where((top_p < 1) & (before >= top_p), -jnp.inf, ranked)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(kept, back, axis=-1)


def categorical(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws int32 [rows] tokens from softmax(logits) by inverting the distribution function.

    One uniform number a row replaces the vocabulary-wide noise of the Gumbel trick, which on a CPU
    costs as much as decoding a token.  The inverse is taken in two stages, a block of the
    vocabulary and then a token in it, so that no running sum spans the whole vocabulary.

    Args:
      logits: float32 [rows, vocab]; -inf is never drawn.
      uniforms: float32 [rows] in [0, 1).
    """
    rows, vocab = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)

    def invert(masses: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Running sums by a product: of a cumulative sum XLA makes several kernels to compile.
        order = jnp.arange(masses.shape[-1])
        is_before = (order[:, None] <= order[None]).astype(masses.dtype)
        running = jnp.matmul(masses, is_before, precision=jax.lax.Precision.HIGHEST)
        # In whatever order it adds, rounding may let the sum rise at an entry without mass and
        # fall at one with: so entries without mass are no candidates, and the target stays
        # strictly under the highest candidate.
        candidates = jnp.where(masses > 0, running, -jnp.inf)
        target = jnp.minimum(target, jnp.nextafter(candidates.max(-1), 0.0))
        index = jnp.argmax(candidates > target[:, None], axis=-1)
        before = _pick(running - masses, index)
        return index, jnp.maximum(target - before, 0.0)

    totals = weights.sum(-1)
    block, rest = invert(totals, uniforms * totals.sum(-1))
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1, mode="clip")[:, 0]
    token, _ = invert(inside, rest)
    return (block * _BLOCK + token).astype(jnp.int32)


def draw_token(
    logits: jax.Array,
    uniforms: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    top_k: jax.Array,
    *,
    greedy: bool,
    truncated: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row.

    Args:
      logits: float32 [rows, vocab].
      uniforms: float32 [rows] in [0, 1).
      temperature: float32 scalar above 0; unused when greedy.
      top_p: see ``truncate``; unused unless ``truncated``.
      top_k: see ``truncate``; unused unless ``truncated``.
      greedy: take the likeliest token; its log-probability is that of softmax(logits).
      truncated: apply top-k and top-p.

    Returns:
      int32 [rows] tokens and float32 [rows] log-probabilities under the distribution drawn from.
    """
    if greedy:
        # The first of the largest, in two sweeps: argmax is one, and on a CPU many times slower.
        is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
        numbers = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        token = jnp.where(is_largest, numbers, logits.shape[-1] - 1).min(-1)
    else:
        logits = logits / temperature
        if truncated:
            logits = truncate(logits, top_p, top_k)
        token = categorical(logits, uniforms)
    # Relative to the largest: next to large logits the logarithm of the sum would be rounded away.
    largest = jnp.max(logits, axis=-1)
    chosen = _pick(logits, token) - largest
    return token, chosen - jnp.log(jnp.exp(logits - largest[:, None]).sum(-1))


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """[rows]: of each row of x [rows, columns] the one at ``index`` [rows], which exists."""
    return jnp.take_along_axis(x, index[:, None], axis=-1, mode="clip")[:, 0]
