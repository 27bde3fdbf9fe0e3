"""One array a layer instead of one stack of all layers: how a CPU decodes fast.

Out of a stack, XLA's CPU backend copies a layer's weights and cache before every product with them;
for the few rows of a decoding step that costs as much as the product.  Accelerators slice without a
copy, and a mesh is better served by stacks, so this form is for decoding on one CPU device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax.student.layers import Linear
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

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        # [out, in] x [rows, in]^T: a kernel that stands first is read as it lies; standing second,
        # it would be packed into another layout before each product.
        assert self.layer is not None
        return at_layer([self.kernels], self.layer, product_transposed, x).T


def unstack(graphdef: nnx.GraphDef, lora: nnx.State, base: nnx.State, merged: bool) -> nnx.State:
    """``base`` with the kernels of every linear unstacked, in the compute dtype.

    Called outside jit: in one program of all layers, each would be compiled.

    Args:
      graphdef: the student's, without experts: all linears have all layers.
      lora: adapters.
      base: frozen weights.
      merged: whether adapters are added to the kernels; they must not be applied again then.
    """
    model = nnx.merge(graphdef, lora, base)
    linears = [module for _, module in nnx.iter_graph(model) if isinstance(module, Linear)]
    stacks = []
    for linear in linears:
        adapter = None
        if merged and linear.scale:
            adapter = (linear.lora_a[...], linear.lora_b[...], linear.scale)
        stacks.append((linear.kernel[...], adapter))
    layers = [
        _one_layer(stacks, np.int32(layer), model.compute_dtype)
        for layer in range(model.config.num_hidden_layers)
    ]
    for linear, kernels in zip(linears, zip(*layers, strict=True), strict=True):
        linear.kernel = cast(Any, linear.kernel.replace(Unstacked(kernels)))
    _, *states = nnx.split(model, nnx.LoRAParam, nnx.Param)
    return states[1]


@functools.partial(jax.jit, static_argnums=2)
def _one_layer(
    stacks: list[tuple[jax.Array, Any]], layer: jax.Array, dtype: Any
) -> list[jax.Array]:
    """A layer's kernels [out, in], each with its adapter (A, B, scale) added, or None."""

    def at(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    def kernel(stack: jax.Array, adapter: Any) -> jax.Array:
        own = at(stack).T
        if adapter is not None:
            a, b, scale = adapter
            own = own + scale * jnp.matmul(at(b).T, at(a).T)
        return own.astype(dtype)

    return [kernel(*one) for one in stacks]


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
