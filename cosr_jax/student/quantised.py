"""Frozen kernels in eight or four bits (QLoRA, arXiv:2305.14314), widened one layer at a time.

Besides, experts' kernels in MXFP4 (see ``mxfp4``), as gpt-oss stores them: nothing is lost there.

``Quantised`` stands in the place of a kernel's array, so the module and all who hold its state stay
as they are.  Written here instead of taken from qwix (0.1.8, "alpha"): its providers intercept the
operations of modules whose weights are in memory already, while ours are packed shard by shard as
they are read, and of its arrays only these few lines of arithmetic would be used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax import sharding
from cosr_jax.config import StudentConfig
from cosr_jax.student.mxfp4 import FP4_VALUES, GROUP
from cosr_jax.student.products import frozen_product
from cosr_jax.types import UserError

#: What a code of nf4 means, before the block's scale: quantiles of a normal distribution
#: (arXiv:2305.14314, appendix E).
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

#: Weights over this would not be weights, and near float32's end scales would overflow.
LARGEST = 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel [..., in, out] as codes with a scale for each block of inputs of each output.

    Of four bits a byte holds two codes: in its lower half one of the block's first half, in its
    upper half that of the second half in the same place.
    """

    #: int8 [..., blocks, block, out], or of four bits uint8 [..., blocks, block / 2, out].
    codes: Any
    #: [..., blocks, out]: bfloat16, what the code 1 of int8, or 1.0 of nf4, means; of mxfp4 uint8,
    #: an exponent of two with a bias of 127, which 1.0 means.
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that is meant."""
        *stack, blocks, held, out = self.codes.shape
        return *stack, blocks * held * (1 if self.kind == "int8" else 2), out

    @property
    def dtype(self) -> Any:
        """Of what is packed."""
        return jnp.dtype(jnp.float32)

    @property
    def kind(self) -> str:
        """As ``config.student.quantise`` calls it."""
        if self.codes.dtype == jnp.int8:
            return "int8"
        return "mxfp4" if self.scale.dtype == jnp.uint8 else "nf4"

    def __getitem__(self, index: Any) -> Quantised:
        return self  # what an nnx variable asks of its value

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel [..., in, out]; products are made in float32 and rounded once."""
        if self.kind == "int8":
            values = self.codes[..., None, :, :].astype(jnp.float32)
        else:
            codes = self.codes[..., None, :, :]
            shift = np.array([0, 4], np.uint8).reshape(*(1,) * (codes.ndim - 3), 2, 1, 1)
            table = NF4_VALUES if self.kind == "nf4" else FP4_VALUES
            values = _look_up(table, codes >> shift)
        scale = _power(self.scale) if self.kind == "mxfp4" else self.scale.astype(jnp.float32)
        return (values * scale[..., None, None, :]).astype(dtype).reshape(self.shape)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return frozen_product(x, self)


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """float32 values of the lower four bits, of 16 in ``table``."""
    if sharding.platform() != "tpu":
        return jnp.asarray(table)[codes & 15]
    # A TPU looks up a table one entry at a time; choosing between constants, it takes a vector.
    level: list[Any] = list(table)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [
            jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def _power(exponent: jax.Array) -> jax.Array:
    """float32 two to ``exponent`` - 127, for uint8 from 1 to 254."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


@functools.partial(jax.jit, static_argnames=("kind", "block"))
def quantise(kernel: jax.Array, kind: str, block: int) -> Quantised:
    """Packs a kernel [..., in, out]: nearest codes after division by the block's scale.

    Args:
      kernel: within +-``LARGEST``.
      kind: "int8", whose largest code is 127, "nf4", whose largest value is 1, or "mxfp4".
      block: inputs under one scale; divides their number, and is even for four bits.
    """
    *stack, inside, out = kernel.shape
    values = kernel.astype(jnp.float32).reshape(*stack, inside // block, block, out)
    largest = jnp.max(jnp.abs(values), axis=-2)
    if kind == "mxfp4":
        # The largest value's power of two is that of 4.0 (OCP Microscaling Formats 1.0, section
        # 6.3).  What is MXFP4 already has values for the same numbers under that scale.
        bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) >> 23
        exponent = jnp.maximum(bits, 3).astype(jnp.uint8) - 2
        values = values / _power(exponent)[..., None, :]
        between = (FP4_VALUES[1:8] + FP4_VALUES[:7]) / 2
        codes = _nearest(jnp.abs(values), between) | ((values < 0).astype(jnp.uint8) << 3)
        return Quantised(_in_pairs(codes), exponent)
    largest = largest / (127.0 if kind == "int8" else 1.0)
    # Not by way of astype: a compiler may skip rounding there, and codes are of what is kept.
    scale = jax.lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=7)
    values = values / jnp.where(scale > 0, scale, 1.0)[..., None, :]
    if kind == "int8":
        codes = jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
        return Quantised(codes, scale.astype(jnp.bfloat16))
    codes = _nearest(values, (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2)
    return Quantised(_in_pairs(codes), scale.astype(jnp.bfloat16))


def _nearest(values: jax.Array, between: np.ndarray) -> jax.Array:
    """uint8 numbers of the levels nearest to ``values``, whose bounds are ``between``."""
    start = jnp.zeros(values.shape, jnp.uint8)
    return functools.reduce(lambda found, bound: found + (values > bound), between, start)


def _in_pairs(codes: jax.Array) -> jax.Array:
    """Two codes in a byte, of the first and the second half of [..., blocks, block, out]."""
    first, second = jnp.split(codes, 2, axis=-2)
    return first | (second << 4)


def pack_like(like: Any, kernel: jax.Array) -> Any:
    """``kernel`` in the form of ``like``, an array or ``Quantised``, concrete or abstract.

    Args:
      like: says dtype, or kind and block.
      kernel: of the same dtype (float32 for ``Quantised``), and of any shape that blocks divide.
    """
    if not isinstance(like, Quantised):
        return kernel
    return quantise(kernel, like.kind, like.shape[-2] // like.scale.shape[-2])


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """A variable's axes in ``sharding.RULES``; of a packed kernel, those of what is meant."""
    axes = variable.get_metadata()["axes"]
    return axes.scale if isinstance(axes, Quantised) else axes


def quantised_base(base: nnx.State, linears: tuple[str, ...], config: StudentConfig) -> nnx.State:
    """``base`` (abstract) with the kernels of ``linears``, e.g. "attn.q_proj", packed.

    MXFP4 packs those of experts alone.

    Raises:
      UserError: blocks do not divide a kernel's inputs, or do not go with MXFP4; no experts.
    """
    kind, block = config.quantise, config.quantise_block
    if kind == "none":
        return base
    if kind == "mxfp4":
        linears = tuple(linear for linear in linears if linear.startswith("moe."))
        block = min(block, GROUP)
        if not linears:
            raise UserError(
                "config.student.quantise: mxfp4 packs experts, and this student has none",
                "use nf4 or int8",
            )
        if GROUP % block:
            raise UserError(
                f"config.student.quantise_block: {block} does not divide the {GROUP} values of a "
                "group in MXFP4",
                "use 32, 16, 8, 4 or 2",
            )
    if kind != "int8" and block % 2:
        raise UserError(
            f"config.student.quantise_block: {block} is odd, and {kind} packs two codes in a byte",
            "use an even size, e.g. 64",
        )
    pack = functools.partial(quantise, kind=kind, block=block)

    def packed(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        linear = ".".join(str(part) for part in path[1:-1])
        if path[-1] != "kernel" or linear not in linears:
            return variable
        like, axes = variable.get_raw_value(), variable.get_metadata()["axes"]
        inside = like.shape[-2]
        if inside % block:
            raise UserError(
                f"config.student.quantise_block: {block} does not divide the {inside} inputs of "
                f"{linear}",
                f"use a divisor, e.g. {math.gcd(block, inside)}",
            )
        like = jax.ShapeDtypeStruct(like.shape, jnp.float32)
        return variable.replace(
            jax.eval_shape(pack, like), axes=Quantised((*axes[:-1], None, axes[-1]), axes)
        )

    return nnx.map_state(packed, base)


def is_packed(base: nnx.State) -> bool:
    """Whether any kernel of ``base`` is packed."""
    values = (variable.get_raw_value() for _, variable in base.flat_state())
    return any(isinstance(value, Quantised) for value in values)


def dequantised(base: nnx.State, dtype: Any) -> nnx.State:
    """``base`` with all packed kernels widened to ``dtype``, where there is memory for it."""

    def widened(path: Any, variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_raw_value()
        if not isinstance(value, Quantised):
            return variable
        return variable.replace(value.astype(dtype), axes=logical_axes(variable))

    return nnx.map_state(widened, base)
