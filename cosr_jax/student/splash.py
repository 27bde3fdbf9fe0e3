"""Attention on TPUs: JAX's splash kernel, FlashAttention written in Pallas.

No scores reach the chip's memory, and blocks of keys that no query of a block sees are left out,
those beyond a sliding window too (FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from cosr_jax.student.blockwise import Like, Places
from cosr_jax.student.layers import Window

#: Tokens of a block, large ones first; the kernel works on multiples of the least.
_BLOCKS = (512, 384, 256, 128)


def serves(q: Like) -> bool:
    """Whether sequences are long enough: the scores of one small block are no burden anywhere."""
    return q.shape[1] >= _BLOCKS[-1]


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Places,
    keys: Places,
    window: Window | None = None,
    sinks: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention within segments, of queries that are the last of the keys.

    Sequences that are no whole blocks are padded here.

    Args:
      q: [batch, time, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim].
      v: same.
      queries: where the queries stand.  Padding sees earlier padding, and its output means nothing.
      keys: where the keys stand; a segment's tokens are neighbours, so a window counts columns.
      window: how far the layer sees back; None: everything.
      sinks: float32 [heads], logits of an imaginary key whose value is zero; None: no such key.
      interpret: run the kernel's text on any backend, slowly; for tests.

    Returns:
      [batch, time, heads, head_dim] in q's dtype.
    """
    time, total = q.shape[1], k.shape[1]
    block = _block(time)
    after = -time % block
    before = -(total + after) % block

    def by_head(x: jax.Array, before: int) -> jax.Array:
        x = jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (before, after), (0, 0)])
        return checkpoint_name(x, "attention")

    def padded(segments: jax.Array, before: int) -> jax.Array:
        return jnp.pad(segments, [(0, 0), (before, after)])

    # The kernel has no scale; a factor rounded to bfloat16 would sharpen or dull every softmax.
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    arguments = (
        by_head(scaled, 0),
        by_head(k, before),
        by_head(v, before),
        splash.SegmentIds(padded(queries.segments, 0), padded(keys.segments, before)),
    )

    def attend(size: int | None, arguments: tuple) -> jax.Array:
        shape = time + after, before + total + after
        kernel = _kernel(q.shape[2], shape, size, block, interpret)
        return jax.vmap(lambda *row: kernel(*row, sinks))(*arguments)

    if window is None or window.size >= total:
        out = attend(None, arguments)
    else:
        # Masks are known when a kernel is compiled, a layer's window when the scan comes to it.
        out = jax.lax.cond(
            window.tokens == window.size,
            lambda arguments: attend(window.size, arguments),
            lambda arguments: attend(None, arguments),
            arguments,
        )
    return out[:, :, :time].swapaxes(1, 2)


def _block(time: int) -> int:
    """The largest block for which padding adds less than an eighth, if there is one."""
    return next((size for size in _BLOCKS if -time % size < time / 8), _BLOCKS[-1])


def _kernel(
    heads: int, shape: tuple[int, int], window: int | None, block: int, interpret: bool
) -> Callable[..., jax.Array]:
    """Of ``shape`` (queries, keys) for one row of ``heads``."""
    offset = shape[1] - shape[0]
    mask: masks.Mask
    if window is None:
        mask = masks.CausalMask(shape, offset)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), offset)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name="attention",  # as policies of rematerialisation know it
        interpret=interpret,
    )
