"""What every part of a layer is made of: linears with adapters, norms, rotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax.config import LoraConfig
from cosr_jax.student.lora import (
    adapter_product,
    joined_product,
    joins,
    lora_scale,
    merged_product,
    merges,
)
from cosr_jax.student.products import frozen_product
from cosr_jax.student.quantised import Quantised
from cosr_jax.student.unstacked import Unstacked, times_each


class Linear(nnx.Module):
    """x W, with an optional bias and adapter; its weights are stacked over layers when made."""

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        param_dtype: Any,
        lora: LoraConfig | None,
        bias: bool = False,
    ):
        self.kernel = nnx.Param(
            jnp.zeros((num_layers, in_features, out_features), param_dtype),
            axes=("layers", *axes),
        )
        if bias:
            self.bias = nnx.Param(
                jnp.zeros((num_layers, out_features), param_dtype), axes=("layers", axes[1])
            )
        self.scale = 0.0 if lora is None else lora_scale(lora)
        self.dropout = 0.0 if lora is None else lora.dropout
        if lora is not None:
            self.lora_a = nnx.LoRAParam(
                jnp.zeros((num_layers, in_features, lora.rank), jnp.float32),
                axes=("layers", axes[0], "rank"),
            )
            self.lora_b = nnx.LoRAParam(
                jnp.zeros((num_layers, lora.rank, out_features), jnp.float32),
                axes=("layers", "rank", axes[1]),
            )

    def __call__(
        self, x: jax.Array, adapters: bool = True, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        return together([self], x, adapters, [dropout_key])[0]

    def _output(
        self, tokens: jax.Array, own: jax.Array | None, adapters: bool, dropout_key: Any
    ) -> jax.Array:
        """Of tokens [tokens, in]; ``own`` is their product with the kernel, if there is one yet."""
        out = self._product(tokens, own, adapters, dropout_key if self.dropout else None)
        if hasattr(self, "bias"):
            out = out + self.bias[...].astype(tokens.dtype)[None]
        return out

    def _product(
        self, tokens: jax.Array, own: jax.Array | None, adapters: bool, dropout_key: Any
    ) -> jax.Array:
        kernel = self.kernel[...]
        if not isinstance(kernel, Quantised):  # which is widened within each product
            kernel = kernel.astype(tokens.dtype)
        if not (adapters and self.scale):
            return _times(tokens, kernel) if own is None else own
        a, b = (x[...].astype(tokens.dtype) for x in (self.lora_a, self.lora_b))
        if own is None and dropout_key is None:
            if merges(tokens, a, b):
                return merged_product(tokens, kernel, a, b, self.scale)
            if joins(tokens, kernel):
                return joined_product(tokens, kernel, a, b, self.scale)
        inputs = tokens
        if dropout_key is not None:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, inputs.shape)
            inputs = jnp.where(keep, inputs / (1 - self.dropout), 0)
        own = _times(tokens, kernel) if own is None else own
        return own + adapter_product(inputs, a, b, self.scale)


def together(
    linears: Sequence[Linear], x: jax.Array, adapters: bool, dropout_keys: Sequence[Any]
) -> list[jax.Array]:
    """What each linear makes of the same x [..., in]: [..., out] each.

    Where kernels lie in one array a layer, one switch picks those of all.
    """
    # One token axis: adapter gradients that contract two axes miss XLA CPU's fast product.
    tokens = x.reshape(-1, x.shape[-1])
    kernels: list[Any] = [linear.kernel[...] for linear in linears]
    unstacked = [kernel for kernel in kernels if isinstance(kernel, Unstacked)]
    own: Sequence[Any] = times_each(tokens, unstacked) if unstacked else [None] * len(linears)
    return [
        linear._output(tokens, product, adapters, key).reshape(*x.shape[:-1], -1)
        for linear, product, key in zip(linears, own, dropout_keys, strict=True)
    ]


def _times(tokens: jax.Array, kernel: Any) -> jax.Array:
    is_plain = isinstance(kernel, jax.Array)  # others know how they are multiplied
    return frozen_product(tokens, kernel) if is_plain else tokens @ kernel


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (arXiv:1910.07467); stacked when ``num_layers`` is given.

    Multiplies by weight + offset: Gemma stores its weights around zero, with an offset of one.
    """

    def __init__(
        self, num_layers: int | None, size: int, eps: float, param_dtype: Any, offset: float = 0.0
    ):
        stack, axes = ((), ()) if num_layers is None else ((num_layers,), ("layers",))
        start = jnp.full((*stack, size), 1.0 - offset, param_dtype)
        self.weight = nnx.Param(start, axes=(*axes, "norm"))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE on x [batch, time, heads, head_dim]; cos and sin are [batch, time, 1, head_dim / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer of one forward pass shares."""

    # float32 [batch, time, 1, head_dim / 2], of all layers; where they are of several kinds,
    # [kinds of rotation, ...].
    cos: jax.Array
    sin: jax.Array
    adapters: bool
    counts: jax.Array | None = None  # [batch, time]: of each token by routers; None: no count

    def rotate(self, x: jax.Array, layer: LayerKind) -> jax.Array:
        """RoPE on x [batch, time, heads, head_dim], as that layer does it."""
        if layer.rotation is None:
            return rotate(x, self.cos, self.sin)
        return rotate(x, self.cos[layer.rotation], self.sin[layer.rotation])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """How far attention sees back in one layer of a student whose layers slide, or some of them."""

    tokens: jax.Array  # int32 scalar: the query's own included; more than any sequence: everything
    size: int = dataclasses.field(metadata={"static": True})  # of ``tokens`` in layers that slide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKind:
    """In what one layer differs from the others; scanned beside the weights.

    All layers run the same traced body, so these are numbers that it reads, not branches of
    Python.  None where all layers are alike.
    """

    rotation: jax.Array | None  # int32 scalar: which kind of ``LayerContext``
    window: Window | None
    is_sparse: jax.Array | None = None  # bool scalar: a mixture of experts, not a plain MLP
    row: jax.Array | None = None  # int32 scalar: place among the layers of that kind
    chosen: jax.Array | None = None  # bool [experts]: those whose adapters act
