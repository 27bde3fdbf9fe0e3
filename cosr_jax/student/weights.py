"""Weights in and out: Hugging Face's tensor names against the stacked ones of ``model``."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.lora import init_lora
from cosr_jax.student.model import ModelConfig, Student, abstract_student
from cosr_jax.student.mxfp4 import ExpandedFolder
from cosr_jax.student.names import HfName, hf_names
from cosr_jax.student.quantised import LARGEST, Quantised, logical_axes, pack_like
from cosr_jax.student.sources import resolve_source
from cosr_jax.student.tensor_files import TensorFolder
from cosr_jax.student.text_part import TextFolder, read_text_config
from cosr_jax.types import UserError

#: A stack of layers up to this size is read whole, a larger one layer by layer.
HELD_BYTES = 256 << 20

#: How weights may be stored, as safetensors calls it.
_DTYPES = ("F64", "F32", "F16", "BF16")

#: Entries that are looked at together for what is not finite.
_LOOKED_AT = 1 << 20


def load_config(source: str) -> ModelConfig:
    """The shape of the student behind ``source`` (see ``sources.resolve_source``).

    Raises:
      UserError: the source, or its config.json, cannot be used.
    """
    return ModelConfig.from_hf(read_text_config(resolve_source(source)))


def load_student(
    config: StudentConfig,
    lora: LoraConfig,
    mesh: Mesh | None = None,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Student:
    """The student with its weights read and fresh adapters.

    Every device gets only its own part, straight from the file; the host never holds more than the
    larger of one layer's tensor and ``HELD_BYTES``.

    Args:
      config: source and dtypes.
      lora: of the adapters.
      mesh: where to place the weights; None is the default device.
      seed: of the adapters' start values.
      tell: gets a line on how far the reading has come, every few seconds.

    Raises:
      UserError: the source cannot be used, or a tensor is missing, unexpected, of another shape or
        kind of number, or not finite.
    """
    folder = resolve_source(config.source)
    model = ModelConfig.from_hf(read_text_config(folder))
    abstract = abstract_student(model, config, lora)
    base = load_base(abstract, folder, mesh, tell)
    return dataclasses.replace(abstract, base=base, lora=init_lora(abstract.lora, seed, mesh))


def load_base(
    student: Student,
    folder: Path,
    mesh: Mesh | None = None,
    tell: Callable[[str], None] | None = None,
) -> nnx.State:
    """Frozen weights from a folder, in the dtypes and shapes of ``student``, concrete or abstract.

    Of a multimodal model the text part is read.

    Raises:
      UserError: a file cannot be read, or a tensor is missing, unexpected, of another shape or kind
        of number, or not finite.
    """
    stored = TensorFolder(folder)
    files = TextFolder(stored, tell)
    tensors = ExpandedFolder(files)
    names = hf_names(student.config)
    _check_names(tensors, student.base, names)
    if student.config.tie_word_embeddings:
        _check_tied(stored)
    leaves = {}
    for path, variable in student.base.flat_state():
        leaves[path] = variable.replace(
            _read_variable(tensors, names[path], variable, mesh, ".".join(map(str, path)))
        )
    files.report()
    return nnx.State.from_flat_path(leaves)


def hf_tensors(
    config: ModelConfig, variables: Iterable[tuple[tuple[Any, ...], jax.Array]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Host copies under Hugging Face's names and shapes, one layer after another.

    Args:
      config: the student's shape.
      variables: path in the base state, and value.
    """
    names = hf_names(config)
    for path, value in variables:
        name = names[path]
        for place in np.ndindex(value.shape[: name.stacks]):
            part = np.asarray(value[place] if place else value)
            yield name.tensor(place), part.T if name.transposed else part


def _check_names(
    tensors: ExpandedFolder, abstract: nnx.State, names: dict[tuple[Any, ...], HfName]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, variable in abstract.flat_state():
        name, shape = names[path], variable.get_raw_value().shape
        stacks, shape = shape[: name.stacks], shape[name.stacks :]
        for place in np.ndindex(stacks):
            expected[name.tensor(place)] = shape[::-1] if name.transposed else shape
    # Left by older exporters: a copy of the tied embedding, and buffers that are recomputed.
    unused = {name for name in tensors.names if name.endswith("rotary_emb.inv_freq")}
    if ("lm_head",) not in dict(abstract.flat_state()):
        unused.add("lm_head.weight")
    for found, what in (
        (expected.keys() - tensors.names, "is missing"),
        (tensors.names - expected.keys() - unused, "is not one of this architecture"),
    ):
        if found:
            first, *others = sorted(found)
            more = f" (and {len(others)} more)" if others else ""
            raise UserError(
                f"{tensors.folder}: tensor {first!r}{more} {what}",
                "take config.json and weights of the same model",
            )
    for tensor, shape in expected.items():
        if tensors.shape(tensor) != shape:
            raise UserError(
                f"{tensors.folder}: tensor {tensor!r} has shape {list(tensors.shape(tensor))}, "
                f"config.json says {list(shape)}",
                "take config.json and weights of the same model",
            )
        if tensors.dtype(tensor) not in _DTYPES:
            raise UserError(
                f"{tensors.folder}: tensor {tensor!r} is of dtype {tensors.dtype(tensor)}, not one "
                f"of {', '.join(_DTYPES)}",
                "use the weights that were not quantised, or MXFP4",
            )


def _check_tied(files: TensorFolder) -> None:
    """A copy of the tied embedding must be one: transformers ties no others, and uses both."""
    head, embed = (
        next((name for name in sorted(files.names) if f".{name}".endswith(end)), None)
        for end in (".lm_head.weight", ".embed_tokens.weight")
    )
    if head is None or embed is None:
        return
    shape = files.shape(embed)
    rows = max(1, _LOOKED_AT // max(1, math.prod(shape[1:])))
    pieces = [(slice(at, min(at + rows, shape[0])),) for at in range(0, shape[0], rows)]
    if files.shape(head) != shape or not all(
        np.array_equal(files.read(head, piece), files.read(embed, piece)) for piece in pieces
    ):
        raise UserError(
            f"{files.folder}: tensor {head!r} is no copy of {embed!r}, but config.json has "
            "tie_word_embeddings true",
            "set it to false there, if both are meant; otherwise get the files again",
        )


def _read_variable(
    tensors: ExpandedFolder, name: HfName, variable: nnx.Variable, mesh: Mesh | None, known_as: str
) -> Any:
    """A variable's value in its shards; ``variable`` has its shape, dtype or packed form, and axes.

    The host holds one device's part of it at a time; of a large stack, one layer of that part.
    What is packed is so on its device, part by part.
    """
    like = variable.get_raw_value()
    where: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    of_arrays = jax.tree.map(lambda _: where, like)
    if mesh is not None:
        of_arrays = sharding.variable_sharding(mesh, variable, known_as)
        axes = logical_axes(variable)
        where = sharding.array_sharding(mesh, axes, like.shape, known_as)
    shards = where.addressable_devices_indices_map(like.shape)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # replicas share what is read
    for device, index in shards.items():
        assert index is not None  # every device is addressable by its own process
        part = (s.indices(size)[:2] for s, size in zip(index, like.shape, strict=True))
        holders.setdefault(tuple(part), []).append(device)
    read = functools.partial(_read_part, tensors, name, like)
    pack = functools.partial(pack_like, like)
    parts: dict[jax.Device, Any] = {}
    for bounds, devices in holders.items():
        shape = tuple(stop - start for start, stop in bounds)
        if not name.stacks or math.prod(shape) * like.dtype.itemsize <= HELD_BYTES:
            value = read(bounds)
            parts |= {device: pack(jax.device_put(value, device)) for device in devices}
            continue
        for device in devices:
            empty = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, like.dtype))
            parts[device] = jax.tree.map(
                lambda x, device=device: jnp.zeros(x.shape, x.dtype, device=device), empty
            )
        (first, last), *rest = bounds
        for row in range(first, last):
            value = read(((row, row + 1), *rest))
            for device in devices:
                layer = pack(jax.device_put(value, device))
                parts[device] = _put_layer(parts[device], layer, row - first)
    return jax.tree.map(
        lambda x, where, *arrays: jax.make_array_from_single_device_arrays(
            x.shape, where, list(arrays)
        ),
        like,
        of_arrays,
        *(parts[device] for device in shards),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: Any, layer: Any, row: int) -> Any:
    def put(stack: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, layer, row, 0)

    return jax.tree.map(put, stack, layer)


def _read_part(
    tensors: ExpandedFolder, name: HfName, like: Any, bounds: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """The part of a variable within ``bounds``, (start, stop) of each axis, not packed yet."""
    index = tuple(slice(*pair) for pair in bounds)
    inner = index[name.stacks :]

    def one(tensor: str) -> np.ndarray:
        value = tensors.read(tensor, inner[::-1] if name.transposed else inner)
        _check_finite(tensors, tensor, value)
        value = np.asarray(value.T if name.transposed else value, like.dtype)
        if isinstance(like, Quantised) and not -LARGEST <= value.min() <= value.max() <= LARGEST:
            raise UserError(
                f"{tensors.folder}: tensor {tensor!r} has entries over {LARGEST:g}",
                "get the files again, or set config.student.quantise=none",
            )
        return value

    if not name.stacks:
        return one(name.tensor(()))
    shape = [stop - start for start, stop in bounds]
    if math.prod(shape[: name.stacks]) == 1:
        return one(name.tensor(tuple(s.start for s in index[: name.stacks]))).reshape(shape)
    out = np.empty(shape, like.dtype)
    for at in np.ndindex(out.shape[: name.stacks]):
        out[at] = one(name.tensor(tuple(s.start + i for s, i in zip(index, at, strict=False))))
    return out


def _check_finite(tensors: ExpandedFolder, name: str, value: np.ndarray) -> None:
    """In pieces, so that looking takes no memory to speak of."""
    entries = value.reshape(-1)
    for start in range(0, len(entries), _LOOKED_AT):
        if not np.isfinite(entries[start : start + _LOOKED_AT]).all():
            raise UserError(
                f"{tensors.folder}: tensor {name!r} has entries that are not finite",
                "get the files again",
            )
