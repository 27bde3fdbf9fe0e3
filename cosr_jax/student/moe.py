"""Mixtures of experts: a router sends each token to a few of many MLPs.

Tokens are sorted by expert and meet their experts' weights in one grouped product
(``jax.lax.ragged_dot``), so nothing is padded and no token is dropped.  On a mesh each chip keeps
some experts whole (logical axis "expert"): it computes what its own experts add to the tokens of
its rows, and the parts are summed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.student.families import MoeConfig
from cosr_jax.student.layers import LayerContext, LayerKind
from cosr_jax.student.lora import lora_scale
from cosr_jax.student.mlp import gated
from cosr_jax.student.quantised import Quantised, logical_axes
from cosr_jax.student.routing import RouterLoad, router_load
from cosr_jax.student.shape import ModelConfig
from cosr_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Assignments:
    """Tokens as their experts see them: one row for each (token, expert) pair, sorted by expert."""

    expert: jax.Array  # int32 [pairs]; which of the experts here
    sizes: jax.Array  # int32 [experts]; rows of each; later rows belong to experts elsewhere


class ExpertLinear(nnx.Module):
    """x W of each row's own expert, with optional biases and adapters; stacked over layers."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        param_dtype: Any,
        lora: LoraConfig | None,
        bias: bool,
    ):
        stack = (num_layers, num_experts)
        self.kernel = nnx.Param(
            jnp.zeros((*stack, in_features, out_features), param_dtype),
            axes=("layers", "expert", *axes),
        )
        if bias:
            self.bias = nnx.Param(
                jnp.zeros((*stack, out_features), param_dtype), axes=("layers", "expert", axes[1])
            )
        self.scale = 0.0 if lora is None else lora_scale(lora)
        if lora is not None:
            self.lora_a = nnx.LoRAParam(
                jnp.zeros((*stack, in_features, lora.rank), jnp.float32),
                axes=("layers", "expert", axes[0], "rank"),
            )
            self.lora_b = nnx.LoRAParam(
                jnp.zeros((*stack, lora.rank, out_features), jnp.float32),
                axes=("layers", "expert", "rank", axes[1]),
            )

    def __call__(
        self, x: jax.Array, rows: Assignments, adapters: bool, chosen: jax.Array | None
    ) -> jax.Array:
        """[pairs, in] -> [pairs, out]; adapters act where ``chosen`` bool [experts] says."""
        kernel = self.kernel[...]
        # For the backward pass what is packed is kept so, and widened again.
        product = jax.checkpoint(_grouped) if isinstance(kernel, Quantised) else _grouped
        out = product(x, kernel, rows.sizes)
        if hasattr(self, "bias"):
            out = out + self.bias[...].astype(x.dtype)[rows.expert]
        if adapters and self.scale:
            low = jax.lax.ragged_dot(x, self.lora_a[...].astype(x.dtype), rows.sizes) * self.scale
            if chosen is not None:
                low = jnp.where(chosen[rows.expert][:, None], low, 0)
            out = out + jax.lax.ragged_dot(low, self.lora_b[...].astype(x.dtype), rows.sizes)
        return out


def _grouped(x: jax.Array, kernel: Any, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)


def chosen_experts(config: ModelConfig, lora: LoraConfig) -> tuple[tuple[bool, ...], ...] | None:
    """Whose adapters act, by layer and expert; None where all do.

    Raises:
      UserError: a pattern matches no expert.
    """
    if config.moe is None or all(pattern == ".*" for pattern in lora.experts):
        return None
    chosen = np.zeros((config.num_hidden_layers, config.moe.num_experts), bool)
    for pattern in lora.experts:
        places = [
            (layer, expert)
            for layer in config.sparse_layers
            for expert in range(config.moe.num_experts)
            if re.fullmatch(pattern, f"{layer}.{expert}")
        ]
        if not places:
            raise UserError(
                f"config.lora.experts: {pattern!r} matches no expert",
                f"write LAYER.EXPERT, e.g. {config.sparse_layers[0]}\\.[0-3] or .*\\.0",
            )
        chosen[tuple(zip(*places, strict=True))] = True
    return tuple(map(tuple, chosen.tolist()))


class Router(nnx.Module):
    """Which experts a token goes to, and how much each counts."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, num_layers: int, param_dtype: Any):
        self.config = moe
        shape = (num_layers, config.hidden_size, moe.num_experts)
        self.kernel = nnx.Param(jnp.zeros(shape, param_dtype), axes=("layers", "embed", None))
        if moe.clamped:
            bias = jnp.zeros((num_layers, moe.num_experts), param_dtype)
            self.bias = nnx.Param(bias, axes=("layers", None))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights float32 and expert numbers int32, both [tokens, experts_per_token].

        A softmax over all experts, of which the largest few are kept; normalised, that is the
        softmax over those few.
        """
        return self._choice(self._logits(x))

    def load(self, x: jax.Array, counts: jax.Array) -> RouterLoad:
        """What the router does with [tokens, hidden], each counted ``counts`` [tokens] times."""
        logits = self._logits(x)
        return router_load(logits, self._choice(logits)[1], counts)

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = x @ self.kernel[...].astype(x.dtype)
        if hasattr(self, "bias"):
            logits = logits + self.bias[...].astype(x.dtype)[None]
        return logits.astype(jnp.float32)

    def _choice(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = self.config.experts_per_token
        if self.config.normalised:
            best, experts = jax.lax.top_k(logits, number)
            return jax.nn.softmax(best, axis=-1), experts
        return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), number)


class Moe(nnx.Module):
    """Router and experts of the layers that have them."""

    def __init__(
        self,
        config: ModelConfig,
        make_expert_linear: Callable[..., ExpertLinear],
        param_dtype: Any,
    ):
        assert config.moe is not None
        moe = self.config = config.moe
        self.activation = config.activation
        d, f = config.hidden_size, moe.intermediate_size
        self.router = Router(config, moe, len(config.sparse_layers), param_dtype)
        inwards, outwards = ("embed", "expert_mlp"), ("expert_mlp", "embed")
        if moe.clamped:
            self.gate_up_proj = make_expert_linear("moe.gate_up_proj", d, 2 * f, inwards)
        else:
            self.gate_proj = make_expert_linear("moe.gate_proj", d, f, inwards)
            self.up_proj = make_expert_linear("moe.up_proj", d, f, inwards)
        self.down_proj = make_expert_linear("moe.down_proj", f, d, outwards)

    def __call__(self, x: jax.Array, context: LayerContext, layer: LayerKind) -> jax.Array:
        """[batch, time, hidden] -> same."""
        if jax.sharding.get_abstract_mesh().empty:
            return self._mix(x, context.adapters, layer.chosen, 0)
        graphdef, state = nnx.split(self)
        expert_axes = sharding.RULES["expert"]

        def spec(_: Any, variable: nnx.Variable) -> nnx.Variable:
            # The scan took the layers axis; of the others only the experts stay apart.
            axes = logical_axes(variable)[1:]
            names = (expert_axes if axis == "expert" else None for axis in axes)
            return variable.replace(PartitionSpec(*names))

        def part(x: jax.Array, state: nnx.State, chosen: jax.Array | None) -> jax.Array:
            own = nnx.merge(graphdef, state)
            first = jax.lax.axis_index(expert_axes) * own.down_proj.kernel[...].shape[0]
            return jax.lax.psum(own._mix(x, context.adapters, chosen, first), expert_axes)

        rows = PartitionSpec(sharding.RULES["batch"])
        return jax.shard_map(
            part,
            in_specs=(rows, nnx.map_state(spec, state), PartitionSpec(expert_axes)),
            out_specs=rows,
            check_vma=False,  # the grouped product has no rule for it
        )(x, state, layer.chosen)

    def _mix(
        self, x: jax.Array, adapters: bool, chosen: jax.Array | None, first: jax.Array | int
    ) -> jax.Array:
        """What the experts here, numbers ``first`` and up, add to [batch, time, hidden]."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(tokens)
        number, here = experts.shape[1], self.down_proj.kernel[...].shape[0]
        expert = experts.reshape(-1) - first
        is_here = (expert >= 0) & (expert < here)
        expert = jnp.where(is_here, expert, here)  # those elsewhere come last
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=here).astype(jnp.int32)
        rows = Assignments(jnp.minimum(expert[order], here - 1), sizes)
        out = self._feed(tokens[order // number], rows, adapters, chosen)
        # Rows past the last group hold nothing that was computed.
        out = jnp.where(is_here[order][:, None], out, 0)
        by_token = out[jnp.argsort(order)].reshape(-1, number, x.shape[-1])
        mixed = jnp.einsum("nkd,nk->nd", by_token, weights.astype(x.dtype))
        return mixed.reshape(x.shape)

    def _feed(
        self, x: jax.Array, rows: Assignments, adapters: bool, chosen: jax.Array | None
    ) -> jax.Array:
        """Each row through its expert's MLP, [pairs, hidden] -> same."""
        if self.config.clamped:
            both = self.gate_up_proj(x, rows, adapters, chosen)
            inner = clamped_swiglu(both, self.config.swiglu_alpha, self.config.swiglu_limit)
        else:
            gate = self.gate_proj(x, rows, adapters, chosen)
            inner = gated(self.activation, gate, self.up_proj(x, rows, adapters, chosen))
        return self.down_proj(inner, rows, adapters, chosen)


def clamped_swiglu(x: jax.Array, alpha: float, limit: float) -> jax.Array:
    """gpt-oss' (up + 1) gate sigmoid(alpha gate), [..., 2 width] -> [..., width].

    Gate and up alternate in ``x``; the gate is at most ``limit``, up within +-``limit``.  In
    float32 and rounded once, as in ``mlp.gated``.
    """
    gate, up = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return ((up + 1) * gate * jax.nn.sigmoid(alpha * gate)).astype(x.dtype)
