"""A copy of the base weights to decode with on one CPU device: unstacked, adapters merged in."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax.student.layers import Linear
from cosr_jax.student.unstacked import Unstacked


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
