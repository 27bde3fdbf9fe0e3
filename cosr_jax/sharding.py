"""The mesh and the one table that maps logical axes to it.

Parameters and activations name logical axes ("embed", "mlp", "batch"); ``RULES`` says which mesh
axes shard each.  Moving from a laptop to a pod changes ``MeshConfig``, never the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cosr_jax.config import MeshConfig
from cosr_jax.types import UserError

MESH_AXES = ("data", "fsdp", "tensor")

#: Logical axis -> mesh axes that shard it.  Axes not listed may not be used.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),  # a batch that every holder of a share of the vocabulary sees
    "time": (),
    "layers": (),
    "embed": ("fsdp",),
    # Tokens travel to the vocabulary, not the other way: a chip keeps its share of the embedding
    # (0.5 GB for 150k entries of 1536) and works on it for all rows of its replica.
    "vocab": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # Experts stay whole on a chip: they are spread instead of their width.
    "expert": ("tensor",),
    "expert_mlp": (),
    "rank": (),
    "hidden": (),  # the residual stream of activations
    "norm": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over ``devices`` (default: all of them).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"config.mesh: data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} "
            f"does not fit {len(devices)} devices",
            "choose sizes whose product is the number of devices, or -1 for what remains",
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=list(devices)
    )


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes.

    Raises:
      KeyError: an axis is not in ``RULES``.
      ValueError: two dimensions would be sharded over the same mesh axis.
    """
    entries = [RULES[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*(entry if entry else None for entry in entries))


def array_sharding(
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    name: str = "array",
    remedy: str = "choose a smaller mesh axis",
) -> NamedSharding:
    """Where an array of ``shape`` with these logical axes lives on ``mesh``.

    Raises:
      UserError: a dimension is not divisible by the mesh axes that shard it.
    """
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = RULES[axis] if axis is not None else ()
        shards = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % shards:
            raise UserError(
                f"config.mesh: axis {axis!r} of {name} has {size} entries, "
                f"which {shards} shards ({' x '.join(mesh_axes)}) do not divide",
                remedy,
            )
    return NamedSharding(mesh, partition_spec(axes))


def state_shardings(mesh: Mesh, state: nnx.State) -> Any:
    """The sharding of every variable of ``state``, by the logical ``axes`` it was made with."""

    def of(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        name = ".".join(str(part) for part in path)
        return variable.replace(variable_sharding(mesh, variable, name))

    return nnx.map_state(of, state)


def variable_sharding(mesh: Mesh, variable: nnx.Variable, name: str) -> Any:
    """The sharding of each array of a variable's value, which may be a pytree; so are its ``axes``.

    Raises:
      UserError: as ``array_sharding``.
    """

    def of(path: Any, value: Any, axes: Sequence[str | None]) -> NamedSharding:
        if not path:
            return array_sharding(mesh, axes, value.shape, name)
        part = f"{name}{jax.tree_util.keystr(path)} (packed in blocks)"
        remedy = "choose a smaller mesh axis, or a smaller config.student.quantise_block"
        return array_sharding(mesh, axes, value.shape, part, remedy)

    value, axes = variable.get_raw_value(), variable.get_metadata()["axes"]
    return jax.tree_util.tree_map_with_path(of, value, axes)


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu".

    That of the mesh in context, which may be of chips that are not here, else of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout inside jit; a no-op outside any mesh (``jax.set_mesh``)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
