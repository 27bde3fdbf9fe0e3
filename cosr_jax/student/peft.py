"""Adapters and merged weights in the formats of PEFT and transformers.

PEFT's layout (huggingface/peft, ``src/peft/tuners/lora``): ``adapter_config.json`` beside
``adapter_model.safetensors``, where A is [rank, in] and B [out, rank], the transposes of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.student.lora import lora_scale
from cosr_jax.student.model import Student
from cosr_jax.student.names import hf_module
from cosr_jax.student.tensor_files import (
    building,
    copy_tokenizer,
    open_safetensors,
    read_json,
    write_tensors,
)
from cosr_jax.student.weights import hf_tensors
from cosr_jax.types import UserError

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


def export_adapter(
    student: Student, lora: LoraConfig, folder: Path, base_name: str, replace: bool = False
) -> None:
    """Writes the adapters so that ``peft.PeftModel.from_pretrained`` loads them.

    Args:
      student: whose adapters.
      lora: their settings.
      folder: appears whole or not at all.
      base_name: path or hub id of the base model, for those who load the adapter by itself.
      replace: whether a non-empty ``folder`` gives way.

    Raises:
      UserError: ``folder`` is not empty.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted({linear.split(".")[-1] for linear in _linears(student.lora)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with building(folder, replace) as fresh:
        (fresh / CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        tensors = {
            name: np.ascontiguousarray(np.asarray(value[layer]).T)
            for name, value, layer in _named(student.lora)
        }
        save_file(tensors, fresh / TENSORS_NAME, metadata={"format": "pt"})


def import_adapter(
    folder: Path, student: Student, lora: LoraConfig, mesh: Mesh | None = None
) -> nnx.State:
    """Adapters in PEFT's format as the ``lora`` state of ``student``.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      student: concrete or abstract; its adapters say which tensors are wanted.
      lora: settings that the adapter must agree with.
      mesh: where to place the values; None is the default device.

    Raises:
      UserError: a file cannot be read, a setting differs, or a tensor is missing, unexpected or
        of another shape.
    """
    _check_settings(folder / CONFIG_NAME, lora)
    file = open_safetensors(folder / TENSORS_NAME)
    expected = {name: value.shape[1:] for name, value, _ in _named(student.lora)}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for names, what in (
        (expected.keys() - found.keys(), "is missing"),
        (found.keys() - expected.keys(), "fits no adapter of this student"),
    ):
        if names:
            raise UserError(
                f"{folder / TENSORS_NAME}: tensor {min(names)!r} {what}",
                "set lora.targets to the modules that this adapter was trained on",
            )
    for name, shape in expected.items():
        if found[name] != shape[::-1]:
            raise UserError(
                f"{folder / TENSORS_NAME}: tensor {name!r} has shape {list(found[name])}, "
                f"expected {list(shape[::-1])}",
                "use an adapter that was trained on this student",
            )
    leaves = {}
    for path, variable in student.lora.flat_state():
        like = variable.get_raw_value()
        stacked = np.stack(
            [
                file.get_tensor(_peft_name(path, layer)).astype(like.dtype).T
                for layer in range(like.shape[0])
            ]
        )
        where = None
        if mesh is not None:
            where = sharding.array_sharding(mesh, variable.get_metadata()["axes"], like.shape)
        leaves[path] = variable.replace(jax.device_put(stacked, where))
    return nnx.State.from_flat_path(leaves)


def export_merged(
    student: Student, lora: LoraConfig, folder: Path, source: Path, replace: bool = False
) -> None:
    """Writes a folder for ``transformers`` whose weights are W + scale * A B, in W's dtype.

    Sums are made in float32 and rounded once.

    Args:
      student: whose weights.
      lora: settings of its adapters.
      folder: appears whole or not at all.
      source: the student's own folder (``sources.resolve_source``): config.json and tokenizer.
      replace: whether a non-empty ``folder`` gives way.

    Raises:
      UserError: ``folder`` is not empty, or ``source`` has no config.json.
    """
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)  # the older spelling of dtype
    config["dtype"] = str(jax.tree.leaves(student.base)[0].dtype)
    with building(folder, replace) as fresh:
        (fresh / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        copy_tokenizer(source, fresh)
        write_tensors(fresh, hf_tensors(student.config, _merged(student, lora)))


def _merged(student: Student, lora: LoraConfig) -> Iterator[tuple[tuple[Any, ...], jax.Array]]:
    """Path and value of every frozen weight with its adapter added, one at a time."""
    adapters = {path: variable.get_raw_value() for path, variable in student.lora.flat_state()}
    scale = lora_scale(lora)

    @jax.jit
    def add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

    for path, variable in student.base.flat_state():
        value, module = variable.get_raw_value(), path[:-1]
        if path[-1] == "kernel" and (*module, "lora_a") in adapters:
            value = add(value, adapters[*module, "lora_a"], adapters[*module, "lora_b"])
        yield path, value


def _check_settings(path: Path, lora: LoraConfig) -> None:
    values = read_json(path)
    wanted = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        # Variants whose update is not scale * A B of one rank.
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    required = ("peft_type", "r", "lora_alpha")
    for key, value in wanted.items():
        if key in required and key not in values:
            raise UserError(f"{path}: key {key!r} is missing", "get the adapter's files again")
        found = values.get(key, value)
        if (found or None) != (value or None):
            raise UserError(
                f"{path}: {key} {found!r} differs from the run's {value!r}",
                "set the lora section to the adapter's values, if it is plain LoRA",
            )


def _linears(lora: nnx.State) -> list[str]:
    return sorted({".".join(map(str, path[1:-1])) for path, _ in lora.flat_state()})


def _peft_name(path: tuple[Any, ...], layer: int) -> str:
    """("layers", "attn", "q_proj", "lora_a") -> PEFT's name in that layer."""
    module = hf_module(".".join(path[1:-1])).format(layer=layer)
    return f"base_model.model.{module}.lora_{path[-1][-1].upper()}.weight"


def _named(lora: nnx.State) -> Iterator[tuple[str, Any, int]]:
    """(PEFT's name, stacked value, layer) of every adapter matrix."""
    for path, variable in lora.flat_state():
        value = variable.get_raw_value()
        for layer in range(value.shape[0]):
            yield _peft_name(path, layer), value, layer
