"""One array a layer instead of one stack of all layers: how a CPU decodes fast.

Out of a stack, XLA's CPU backend copies a layer's weights and cache before every product with them;
for the few rows of a decoding step that costs as much as the product.  Accelerators slice without a
copy, and a mesh is better served by stacks, so this form is for decoding on one CPU device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from cosr_jax.student.packed import Packed
from cosr_jax.student.products import product_transposed
from cosr_jax.student.stacks import sliceable, sliced

#: Arrays of all layers: one with a leading layers axis, or one a layer.
Stack = Packed | tuple[Packed, ...]


def at_layer(
    stacks: Sequence[Stack], layer: jax.Array, use: Callable[..., Any], *operands: jax.Array
) -> Any:
    """``use(*(stack[layer] for stack in stacks), *operands)`` inside a scan over layers.

    With one array a layer a switch picks the arrays.  It should hold bare products: its branches
    are compiled once a layer, which for products alone costs next to nothing.

    Args:
      stacks: each of all layers.
      layer: int32 scalar.
      use: pure; all layers give the same shapes.
      *operands: arrays.
    """
    if isinstance(stacks[0], tuple):
        use = jax.jit(use)  # traced once, not once a layer
        layers = zip(*stacks, strict=True)
        branches = [lambda *operands, of=of: use(*of, *operands) for of in layers]
        return jax.lax.switch(layer, branches, *operands)
    of = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), sliceable(stacks)
    )
    return use(*sliced(of), *operands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """Kernels of one linear, in the place of the stack that ``Linear`` multiplies with."""

    kernels: tuple[jax.Array, ...]  # for each layer [out, in], in the compute dtype
    layer: jax.Array | None = None  # int32 scalar; the layer whose kernel is meant

    def __getitem__(self, index: Any) -> Unstacked:
        return self  # what an nnx variable asks of its value

    def astype(self, dtype: Any) -> Unstacked:
        """Itself: the dtype is settled when the kernels are unstacked."""
        if self.kernels[0].dtype != dtype:
            raise ValueError(f"kernels of {self.kernels[0].dtype} in a product of {dtype}")
        return self


def times_each(x: jax.Array, linears: Sequence[Unstacked]) -> list[jax.Array]:
    """x [rows, in] times the kernel of each: [rows, out] each."""

    def products(*operands: jax.Array) -> list[jax.Array]:
        # [out, in] x [rows, in]^T: a kernel that stands first is read as it lies; standing second,
        # it would be packed into another layout before each product.
        *kernels, x = operands
        return [product_transposed(kernel, x) for kernel in kernels]

    layer = linears[0].layer
    assert layer is not None
    return [out.T for out in at_layer([one.kernels for one in linears], layer, products, x)]


def split_stacked(state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Variables of unstacked kernels, and all others, which a scan slices."""

    def is_unstacked(path: Any, variable: nnx.Variable) -> bool:
        return isinstance(variable.get_raw_value(), Unstacked)

    unstacked, stacked = nnx.split_state(state, is_unstacked, ...)
    return unstacked, stacked


def choose_layer(unstacked: nnx.State, layer: jax.Array) -> nnx.State:
    """The same kernels, meaning ``layer``."""
    return nnx.map_state(
        lambda path, v: v.replace(dataclasses.replace(v.get_raw_value(), layer=layer)), unstacked
    )
