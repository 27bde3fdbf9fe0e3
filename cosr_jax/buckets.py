"""Few different array shapes for many different sizes, so that few programs are compiled."""

from __future__ import annotations


def bucket_length(longest: int, limit: int) -> int:
    """The rung that holds ``longest`` tokens: 16, 24, ..., 64, 80, ..., 128, 160, ... or ``limit``.

    Four rungs an octave: padding stays under a quarter from 33 tokens on, and programs few.

    Raises:
      ValueError: ``longest`` is over ``limit``.
    """
    if longest > limit:
        raise ValueError(f"a sequence of {longest} tokens is over the limit of {limit}")
    octave = 1 << max(0, (longest - 1).bit_length() - 1)  # the power of two under ``longest``
    step = max(8, octave // 4)
    return min(max(16, longest + -longest % step), limit)


def bucket_rows(count: int, limit: int, multiple: int = 1) -> int:
    """The padded number of rows for ``count`` rows: at most a quarter more, few distinct values.

    Sizes are multiples of a quarter of the power of two under ``count``, or ``limit``; then they
    are rounded up to ``multiple``, the pieces that a mesh cuts rows into.

    Raises:
      ValueError: ``count`` is over ``limit``.
    """
    if count > limit:
        raise ValueError(f"{count} rows are over the limit of {limit}")
    step = max(1, 1 << max(0, count.bit_length() - 3))
    size = min(count + -count % step, limit)
    return size + -size % multiple
