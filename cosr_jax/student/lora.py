"""Low-rank adapters (arXiv:2106.09685): which linears have one, their scale, their start values.

A linear with kernel W [in, out] gets A [in, rank] and B [rank, out] and computes
x W + scale * (x A) B.  B starts at zero, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.student.products import product, product_transposed
from cosr_jax.student.quantised import Quantised
from cosr_jax.types import UserError


def lora_scale(config: LoraConfig) -> float:
    """alpha / rank, or alpha / sqrt(rank) when rank-stabilised (arXiv:2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)


def merges(tokens: jax.Array, a: jax.Array, b: jax.Array) -> bool:
    """Whether ``merged_product`` is the cheaper and equally exact way for these tokens.

    Merging costs in x out x rank once, the adapter beside it tokens x (in + out) x rank.  Below
    float32 a merged weight would round the adapter away.
    """
    inside, outside = a.shape[0], b.shape[1]
    is_cheaper = tokens.shape[0] * (inside + outside) > inside * outside
    return tokens.dtype == jnp.float32 and is_cheaper


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged_product(
    x: jax.Array, kernel: jax.Array | Quantised, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
    """x (W + scale A B), which is x W + scale (x A) B without the narrow products of the forward
    pass and without their sum over all tokens.  W is frozen and receives no gradient.

    Args:
      x: [tokens, in].
      kernel: W [in, out]; one that is packed is kept so for the backward pass.
      a: [in, rank].
      b: [rank, out].
      scale: of the adapter.

    Returns:
      [tokens, out].
    """
    return product(x, kernel.astype(x.dtype) + scale * product(a, b))


def _merged_forward(x, kernel, a, b, scale):
    return merged_product(x, kernel, a, b, scale), (x, kernel, a, b)


def _merged_backward(scale, saved, pull):
    x, kernel, a, b = saved
    _, pull_a, pull_b = _adapter_pulls(x, a, b, scale, pull)
    merged = kernel.astype(x.dtype) + scale * product(a, b)
    return product_transposed(pull, merged), None, pull_a, pull_b


merged_product.defvjp(_merged_forward, _merged_backward)


def joins(tokens: jax.Array, kernel: Any) -> bool:
    """Whether ``joined_product`` is the cheaper way for tokens that ``merges`` says no to.

    Joining copies tokens x in and in x out numbers; beside it, tokens x out are written, read and
    added up once more.  Measured on a CPU; elsewhere compilers add while they multiply.
    """
    if sharding.platform() != "cpu" or not isinstance(kernel, jax.Array):
        return False
    inside, outside = kernel.shape
    return tokens.shape[0] * (outside - inside) > inside * outside


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def joined_product(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
    """x W + scale (x A) B as one product, [x, scale x A] times W above B.

    Arguments and value as of ``merged_product``; rounded as one sum, whatever the dtype.
    """
    low = product(x, a) * scale
    return product(jnp.concatenate([x, low], axis=1), jnp.concatenate([kernel, b], axis=0))


def _joined_forward(x, kernel, a, b, scale):
    return joined_product(x, kernel, a, b, scale), (x, kernel, a, b)


def _joined_backward(scale, saved, pull):
    x, kernel, a, b = saved
    low_pull, pull_a, pull_b = _adapter_pulls(x, a, b, scale, pull)
    # Joined here, what is copied would be the wide side.
    pull_x = product_transposed(pull, kernel) + product_transposed(low_pull, a)
    return pull_x, None, pull_a, pull_b


joined_product.defvjp(_joined_forward, _joined_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def adapter_product(x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale (x A) B [tokens, out]; arguments as of ``merged_product``."""
    return product(product(x, a) * scale, b)


def _adapter_forward(x, a, b, scale):
    return adapter_product(x, a, b, scale), (x, a, b)


def _adapter_backward(scale, saved, pull):
    x, a, b = saved
    low_pull, pull_a, pull_b = _adapter_pulls(x, a, b, scale, pull)
    return product_transposed(low_pull, a), pull_a, pull_b


adapter_product.defvjp(_adapter_forward, _adapter_backward)


def _adapter_pulls(x, a, b, scale, pull):
    """Gradients of scale (x A) B with respect to x A, to A and to B."""
    low_pull = scale * product_transposed(pull, b)
    # Narrow matrices on the left: contracting the tokens of a wide left side would transpose it.
    pull_a = product(low_pull.T, x).T
    pull_b = scale * product(product(x, a).T, pull)
    return low_pull, pull_a, pull_b


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
    """Number of scalars in ``state``; of a packed kernel, those that are meant."""
    values = (variable.get_raw_value() for _, variable in state.flat_state())
    return sum(math.prod(value.shape) for value in values)
