"""Adapters and merged weights in the formats of PEFT and transformers.

PEFT's layout (huggingface/peft, ``src/peft/tuners/lora``): ``adapter_config.json`` beside
``adapter_model.safetensors``, where A is [rank, in] and B [out, rank], the transposes of ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from cosr_jax.student.model import ModelConfig, Student
from cosr_jax.student.moe import chosen_experts
from cosr_jax.student.names import hf_module, linear_layers
from cosr_jax.student.quantised import Quantised
from cosr_jax.student.tensor_files import (
    building,
    copy_tokenizer,
    open_safetensors,
    read_json,
    write_tensors,
)
from cosr_jax.student.text_part import MODULES_INSIDE, alone, inside
from cosr_jax.student.weights import hf_tensors
from cosr_jax.types import UserError

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


def export_adapter(
    student: Student,
    lora: LoraConfig,
    folder: Path,
    base_name: str,
    replace: bool = False,
    wrapped: bool = False,
) -> None:
    """Writes the adapters so that ``peft.PeftModel.from_pretrained`` loads them.

    Args:
      student: whose adapters.
      lora: their settings.
      folder: appears whole or not at all.
      base_name: path or hub id of the base model, for those who load the adapter by itself.
      replace: whether a non-empty ``folder`` gives way.
      wrapped: whether the student is the text model inside the base model (``text_part``).

    Raises:
      UserError: ``folder`` is not empty, or PEFT has no form for adapters of these linears.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        **_targets(student, wrapped),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with building(folder, replace) as fresh:
        (fresh / CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        values = dict(student.lora.flat_state())
        tensors = {
            tensor.name: tensor.pack(np.asarray(values[tensor.path].get_raw_value()[tensor.place]))
            for tensor in _tensors(student, wrapped)
        }
        save_file(tensors, fresh / TENSORS_NAME, metadata={"format": "pt"})


def import_adapter(
    folder: Path, student: Student, lora: LoraConfig, mesh: Mesh | None = None
) -> nnx.State:
    """Adapters in PEFT's format as the ``lora`` state of ``student``.

    It does not matter whether they were trained on the text model alone or inside its wrapper.

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
    prefix = f"base_model.model.{MODULES_INSIDE}"
    tensors = _tensors(student, any(name.startswith(prefix) for name in file.keys()))  # noqa: SIM118
    expected = {tensor.name: tensor.shape for tensor in tensors}
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
        if found[name] != shape:
            raise UserError(
                f"{folder / TENSORS_NAME}: tensor {name!r} has shape {list(found[name])}, "
                f"expected {list(shape)}",
                "use an adapter that was trained on this student",
            )
    stacks = {
        path: np.empty(variable.get_raw_value().shape, np.float32)
        for path, variable in student.lora.flat_state()
    }
    for tensor in tensors:
        stacks[tensor.path][tensor.place] = tensor.unpack(file.get_tensor(tensor.name))
    _check_chosen(folder / TENSORS_NAME, student.config, lora, stacks)
    leaves = {}
    for path, variable in student.lora.flat_state():
        like, stacked = variable.get_raw_value(), stacks[path]
        where = None
        if mesh is not None:
            where = sharding.array_sharding(mesh, variable.get_metadata()["axes"], like.shape)
        leaves[path] = variable.replace(jax.device_put(stacked, where))
    return nnx.State.from_flat_path(leaves)


def export_merged(
    student: Student, lora: LoraConfig, folder: Path, source: Path, replace: bool = False
) -> None:
    """Writes a folder for ``transformers`` whose weights are W + scale * A B, in plain W's dtype.

    Sums are made in float32 and rounded once.  Packed kernels are widened first: W is what the
    adapters were trained beside.

    Args:
      student: whose weights.
      lora: settings of its adapters.
      folder: appears whole or not at all.
      source: the student's own folder (``sources.resolve_source``): config.json and tokenizer.
      replace: whether a non-empty ``folder`` gives way.

    Raises:
      UserError: ``folder`` is not empty, or ``source`` has no config.json that can be read.
    """
    config = alone(read_json(source / "config.json"))
    config.pop("torch_dtype", None)  # the older spelling of dtype
    config.pop("quantization_config", None)  # what was packed is written plain
    config["dtype"] = str(_plain_dtype(student))
    with building(folder, replace) as fresh:
        (fresh / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        copy_tokenizer(source, fresh)
        write_tensors(fresh, hf_tensors(student.config, _merged(student, lora)))


def _merged(student: Student, lora: LoraConfig) -> Iterator[tuple[tuple[Any, ...], jax.Array]]:
    """Path and value of every frozen weight with its adapter added, one at a time."""
    adapters = {path: variable.get_raw_value() for path, variable in student.lora.flat_state()}
    scale = lora_scale(lora)

    dtype = _plain_dtype(student)

    @jax.jit
    def add(kernel: jax.Array | Quantised, a: jax.Array, b: jax.Array) -> jax.Array:
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * update).astype(dtype)

    for path, variable in student.base.flat_state():
        value, module = variable.get_raw_value(), path[:-1]
        if path[-1] == "kernel" and (*module, "lora_a") in adapters:
            value = add(value, adapters[*module, "lora_a"], adapters[*module, "lora_b"])
        yield path, value.astype(dtype)


def _plain_dtype(student: Student) -> Any:
    """Of the weights that are not packed."""
    return dict(student.base.flat_state())["embed",].get_raw_value().dtype


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


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of an adapter file, and the part of a stacked adapter matrix that it holds."""

    name: str
    path: tuple[Any, ...]
    place: tuple[int, ...]  # leading indices into the stack: (row,) or (row, expert)
    part: tuple[int, ...]  # shape of what lies there: [in, rank] or [rank, out], experts before

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file: [rank, in] or [out, rank], where rank counts all experts' ranks."""
        *experts, first, second = self.part
        ranks = math.prod(experts)
        return (second * ranks, first) if self.is_a else (second, first * ranks)

    @property
    def is_a(self) -> bool:
        """Whether it is A, the factor on the input's side."""
        return self.path[-1] == "lora_a"

    def pack(self, value: np.ndarray) -> np.ndarray:
        """From our layout to the file's.

        A parameter of many experts has one A of [experts x rank, in], expert by expert, and one B
        of [out, rank x experts], rank by rank (PEFT's ``ParamWrapper.get_delta_factors``).
        """
        order = {2: (1, 0), 3: (0, 2, 1) if self.is_a else (2, 1, 0)}[value.ndim]
        return np.ascontiguousarray(value.transpose(order).reshape(self.shape))

    def unpack(self, value: np.ndarray) -> np.ndarray:
        """From the file's layout to ours."""
        if len(self.part) == 2:
            return value.T
        experts, first, second = self.part
        if self.is_a:
            return value.reshape(experts, second, first).transpose(0, 2, 1)
        return value.reshape(second, first, experts).transpose(2, 1, 0)


def _linear(path: tuple[Any, ...]) -> str:
    """("layers", "attn", "q_proj", "lora_a") -> "attn.q_proj"."""
    return ".".join(path[1:-1])


def _tensors(student: Student, wrapped: bool) -> list[_Tensor]:
    """Every tensor of the student's adapter file."""
    linears = {_linear(path) for path, _ in student.lora.flat_state()}
    tensors = []
    for path, variable in student.lora.flat_state():
        linear, shape = _linear(path), variable.get_raw_value().shape
        module, layers = hf_module(student.config, linear), linear_layers(student.config, linear)
        if _is_parameter(student, linear):
            # PEFT wraps the module once for each parameter: the first one lies innermost.
            module = module.rpartition(".")[0]
            if linear != "moe.down_proj" and "moe.down_proj" in linears:
                module += ".base_layer"
        stacks = 1 + ("{expert}" in module)
        for place in np.ndindex(shape[:stacks]):
            full = module.format(layer=layers[place[0]], expert=place[-1])
            full = inside(full) if wrapped else full
            name = f"base_model.model.{full}.lora_{str(path[-1])[-1].upper()}.weight"
            tensors.append(_Tensor(name, path, place, shape[stacks:]))
    return tensors


def _is_parameter(student: Student, linear: str) -> bool:
    """Whether all experts of a linear are one parameter in transformers (gpt-oss)."""
    moe = student.config.moe
    return linear.startswith("moe.") and moe is not None and moe.clamped


def _targets(student: Student, wrapped: bool) -> dict[str, Any]:
    linears = sorted({_linear(path) for path, _ in student.lora.flat_state()})
    parameters = [linear for linear in linears if _is_parameter(student, linear)]
    if any(linear.startswith("mlp.") for linear in linears) and student.config.sparse_layers:
        raise UserError(
            "config.lora.targets: PEFT takes gate_proj, up_proj and down_proj of this student for "
            "its experts' and leaves out those of its plain MLPs",
            "export the merged weights, or do not adapt mlp... of a student with experts",
        )
    if ("moe.gate_proj" in linears) != ("moe.up_proj" in linears):
        raise UserError(
            "config.lora.targets: PEFT joins gate_proj and up_proj of this student's experts, and "
            "loads no adapters of one without the other",
            "export the merged weights, or adapt both of moe.gate_proj and moe.up_proj",
        )
    modules = sorted({linear.split(".")[-1] for linear in linears if linear not in parameters})
    targets: dict[str, Any] = {"target_modules": modules}
    if wrapped:  # the vision tower has a q_proj as well; PEFT takes one string for a pattern
        targets["target_modules"] = rf".*\.language_model\..*\.({'|'.join(modules)})"
    if parameters:
        targets["target_parameters"] = [p.replace("moe.", "mlp.experts.") for p in parameters]
    return targets


def _check_chosen(
    path: Path, config: ModelConfig, lora: LoraConfig, stacks: dict[tuple[Any, ...], np.ndarray]
) -> None:
    """Experts that the run leaves alone must have no adapter that does something."""
    chosen = chosen_experts(config, lora)
    if chosen is None:
        return
    others = ~np.array(chosen)[list(config.sparse_layers)]
    for name, stack in stacks.items():
        if "moe" in name and name[-1] == "lora_b" and stack[others].any():
            raise UserError(
                f"{path}: adapts experts that config.lora.experts {lora.experts} leaves alone",
                "set config.lora.experts to those that this adapter was trained on",
            )
