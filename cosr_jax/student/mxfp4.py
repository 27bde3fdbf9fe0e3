"""MXFP4 weights (OCP Microscaling Formats 1.0, section 5.2) expanded while they are read.

Thirty-two four-bit floats of a row share a power of two.  A folder holds such a weight as two
tensors: ``NAME_blocks`` uint8 [experts, out, groups, 16], two values in a byte with the lower four
bits first, and ``NAME_scales`` uint8 [experts, out, groups], exponents with a bias of 127.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from cosr_jax.student.text_part import TextFolder
from cosr_jax.types import UserError

GROUP = 32  # values under one scale
#: What four bits mean: a sign, two bits of exponent, one of mantissa.
FP4_VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    np.float32,
)


def expand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [..., groups * 32] of blocks [..., groups, 16] and scales [..., groups]; exact."""
    values = np.stack([FP4_VALUES[blocks & 15], FP4_VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*scales.shape, GROUP)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], -1)


class ExpandedFolder:
    """A folder whose packed weights appear as plain ones [experts, in, out].

    In bfloat16, which holds each of their values: two bits and an exponent as wide as its own.

    Raises:
      UserError: blocks without scales of a fitting shape.
    """

    def __init__(self, files: TextFolder):
        self.folder, self._files = files.folder, files
        packed = {n.removesuffix("_blocks") for n in files.names if n.endswith("_blocks")}
        for name in packed:
            self._check(name)
        self._packed = frozenset(packed)
        parts = {f"{name}_{part}" for name in packed for part in ("blocks", "scales")}
        self.names = (files.names - parts) | self._packed

    def _check(self, name: str) -> None:
        if f"{name}_scales" not in self._files.names:
            raise UserError(
                f"{self.folder}: tensor {name + '_scales'!r} is missing", "get the files again"
            )
        blocks, scales = (self._files.shape(f"{name}_{part}") for part in ("blocks", "scales"))
        if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != GROUP // 2:
            raise UserError(
                f"{self.folder}: tensors of {name!r} have shapes {list(blocks)} and {list(scales)},"
                " which are not MXFP4 blocks and scales",
                "get the files again",
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as ``read`` gives it."""
        if name not in self._packed:
            return self._files.shape(name)
        experts, out, groups = self._files.shape(f"{name}_scales")
        return experts, groups * GROUP, out

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors calls it: as ``read`` gives it where it was packed."""
        return "BF16" if name in self._packed else self._files.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at ``index``; only blocks that the part touches are read."""
        if name not in self._packed:
            return self._files.read(name, index)
        experts, inner, out = index or (slice(None),) * 3
        numbers, inputs, outputs = (
            range(*part.indices(size))
            for part, size in zip((experts, inner, out), self.shape(name), strict=True)
        )
        groups = slice(inputs.start // GROUP, -(-inputs.stop // GROUP))
        begin = groups.start * GROUP
        values = np.empty((len(numbers), len(inputs), len(outputs)), jnp.dtype("bfloat16"))
        for row, expert in enumerate(numbers):  # one by one: in float32 they take twice as much
            where = (slice(expert, expert + 1), out, groups)
            parts = (self._files.read(f"{name}_{part}", where)[0] for part in ("blocks", "scales"))
            values[row] = expand(*parts)[:, inputs.start - begin : inputs.stop - begin].T
        return values
