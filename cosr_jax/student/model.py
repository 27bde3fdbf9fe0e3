"""The student as values, and the names by which other rooms know its parts.

Outside this room the student is three values, a graph definition and two pytrees, ``lora``
(trained) and ``base`` (frozen); ``merge`` turns them back into the module inside a jitted function.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.cache import KVCache, attend_cached
from cosr_jax.student.decoder import LINEARS, Decoder, project
from cosr_jax.student.layers import RMSNorm, rotate
from cosr_jax.student.names import linear_names
from cosr_jax.student.quantised import pack_like, quantised_base
from cosr_jax.student.shape import ModelConfig, RopeScaling

__all__ = [
    "LINEARS",
    "Decoder",
    "KVCache",
    "ModelConfig",
    "RMSNorm",
    "RopeScaling",
    "Student",
    "abstract_student",
    "attend_cached",
    "merge",
    "project",
    "random_base",
    "rotate",
]


@dataclasses.dataclass(frozen=True)
class Student:
    """The student as values: what is static, what is trained, what is frozen."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    lora: nnx.State  # float32 leaves
    base: nnx.State  # leaves of the configured param dtype; packed kernels are ``Quantised``


def merge(graphdef: nnx.GraphDef, lora: nnx.State, base: nnx.State) -> Decoder:
    """The module again, inside or outside jit."""
    return nnx.merge(graphdef, lora, base)


def abstract_student(
    config: ModelConfig, student: StudentConfig, lora: LoraConfig | None
) -> Student:
    """A ``Student`` of ``jax.ShapeDtypeStruct`` leaves: shapes and logical axes, no memory."""
    module = nnx.eval_shape(
        lambda: Decoder(
            config,
            lora,
            jnp.dtype(student.param_dtype),
            jnp.dtype(student.compute_dtype),
            student.remat,
        )
    )
    graphdef, adapters, *frozen = nnx.split(module, nnx.LoRAParam, nnx.Param)
    (base,) = frozen
    return Student(config, graphdef, adapters, quantised_base(base, linear_names(config), student))


def random_base(abstract: nnx.State, seed: int, mesh: Mesh | None = None) -> nnx.State:
    """Random frozen weights: normal with deviation 0.02, norms at one.  For tests and plans."""
    root = jax.random.key(seed)
    flat = sorted(abstract.flat_state(), key=lambda item: item[0])

    def draw() -> nnx.State:
        leaves = {}
        for index, (path, variable) in enumerate(flat):
            like = variable.get_raw_value()
            if path[-1] == "weight":
                value = jnp.ones(like.shape, like.dtype)
            else:
                key = jax.random.fold_in(root, index)
                drawn = 0.02 * jax.random.normal(key, like.shape)
                value = pack_like(like, drawn.astype(like.dtype))
            leaves[path] = variable.replace(value)
        return nnx.State.from_flat_path(leaves)

    out_shardings = None if mesh is None else sharding.state_shardings(mesh, abstract)
    return jax.jit(draw, out_shardings=out_shardings)()
