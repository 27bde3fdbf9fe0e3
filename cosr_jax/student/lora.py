"""Low-rank adapters (arXiv:2106.09685): which linears have one, their scale, their start values.

A linear with kernel W [in, out] gets A [in, rank] and B [rank, out] and computes
x W + scale * (x A) B.  B starts at zero, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.types import UserError


def lora_scale(config: LoraConfig) -> float:
    """alpha / rank, or alpha / sqrt(rank) when rank-stabilised (arXiv:2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)


def adapted_names(config: LoraConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` (e.g. "attn.q_proj") that a target pattern matches in full.

    Raises:
      UserError: a pattern matches none.
    """
    for pattern in config.targets:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"config.lora.targets: {pattern!r} matches no linear", f"known: {', '.join(names)}"
            )
    return tuple(n for n in names if any(re.fullmatch(p, n) for p in config.targets))


def init_lora(abstract: nnx.State, seed: int, mesh: Mesh | None = None) -> nnx.State:
    """Start values of the adapters described by ``abstract``, in float32.

    A is uniform in +-1/sqrt(in), as PEFT initialises it (Kaiming uniform with a = sqrt(5)); B is
    zero.  Values depend on ``seed`` and the adapter's place among all, not on the mesh.

    Args:
      abstract: LoRAParam state of ``jax.ShapeDtypeStruct`` leaves.
      seed: of the random draws.
      mesh: where to place the values; None leaves them on the default device.
    """
    root = jax.random.key(seed)
    flat = sorted(abstract.flat_state(), key=lambda item: item[0])

    def draw() -> nnx.State:
        leaves: list[tuple[Any, Any]] = []
        for index, (path, variable) in enumerate(flat):
            like = variable.get_raw_value()
            if path[-1] == "lora_a":
                bound = like.shape[-2] ** -0.5  # [layers, in, rank]
                value = jax.random.uniform(
                    jax.random.fold_in(root, index), like.shape, like.dtype, -bound, bound
                )
            else:
                value = jnp.zeros(like.shape, like.dtype)
            leaves.append((path, variable.replace(value)))
        return nnx.State.from_flat_path(dict(leaves))

    out_shardings = None if mesh is None else sharding.state_shardings(mesh, abstract)
    return jax.jit(draw, out_shardings=out_shardings)()


def count_parameters(state: nnx.State) -> int:
    """Number of scalars in ``state``."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
