"""The feed-forward half of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax.student.layers import LayerContext, Linear, together
from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.stacks import kept

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
    """A gated MLP: SwiGLU, or GeGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear]):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = make_linear("mlp.gate_proj", d, f, ("embed", "mlp"), bias)
        self.up_proj = make_linear("mlp.up_proj", d, f, ("embed", "mlp"), bias)
        self.down_proj = make_linear("mlp.down_proj", f, d, ("mlp", "embed"), bias)

    def __call__(self, x, context: LayerContext, keys: list[Any]):
        projections = self.gate_proj, self.up_proj
        gate, up = (
            kept(out, "mlp") for out in together(projections, x, context.adapters, keys[:2])
        )
        return self.down_proj(gated(self.activation, gate, up), context.adapters, keys[2])


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) up, in float32 and rounded once to the dtype of both.

    In bfloat16 each of its operations would be rounded: a CPU spends more on that than on them.
    """
    inside = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return inside.astype(gate.dtype)
