"""Adapters and merged weights in the formats of PEFT and transformers.

PEFT's (huggingface/peft, ``src/peft/tuners/lora``) is ``adapter_config.json``, which
``peft_settings`` reads, beside ``adapter_model.safetensors``, whose tensors ``peft_layout`` knows.
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
from cosr_jax.student.peft_layout import (
    FACTORS,
    HALVES,
    AdaptedModule,
    adapted_linears,
    adapted_modules,
    are_joined,
    is_parameter,
)
from cosr_jax.student.peft_settings import AdapterSettings, read_settings
from cosr_jax.student.quantised import Quantised
from cosr_jax.student.tensor_files import (
    building,
    copy_tokenizer,
    open_safetensors,
    read_json,
    write_tensors,
)
from cosr_jax.student.text_part import MODULES_INSIDE, alone
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
        **_scaling(student, lora),
        "lora_dropout": lora.dropout,
        **_targets(student, wrapped),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with building(folder, replace) as fresh:
        (fresh / CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        values = dict(student.lora.flat_state())
        tensors = {
            module.tensor(factor): module.pack(
                factor, np.asarray(values[*module.linears[0], factor].get_raw_value()[module.place])
            )
            for module in adapted_modules(student, wrapped)
            for factor in FACTORS
        }
        save_file(tensors, fresh / TENSORS_NAME, metadata={"format": "pt"})


def import_adapter(
    folder: Path, student: Student, lora: LoraConfig, mesh: Mesh | None = None
) -> nnx.State:
    """Adapters in PEFT's format as the ``lora`` state of ``student``.

    It does not matter whether they were trained on the text model alone or inside its wrapper, nor
    whether PEFT joined gate_proj and up_proj of experts into one parameter.  An adapter of lower
    rank than the run's gets further ranks that add nothing yet, A drawn as at the start of a run
    and B zero, and one whose scale ``alpha_pattern`` or ``rank_pattern`` sets apart has the
    quotient of the scales in its B: scale * A B is the file's.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      student: concrete or abstract; its adapters say which tensors are wanted.
      lora: settings that the adapter must agree with.
      mesh: where to place the values; None is the default device.

    Raises:
      UserError: a file cannot be read, the scale differs, the rank does not suffice, or a tensor
        is missing, unexpected or of another shape.
    """
    settings = read_settings(folder / CONFIG_NAME)
    if not math.isclose(lora_scale(settings.usual), lora_scale(lora)):
        raise UserError(
            f"{folder / CONFIG_NAME}: r {settings.usual.rank}, lora_alpha "
            f"{settings.usual.alpha:g} and use_rslora {settings.usual.rank_stabilised} make the "
            f"scale {lora_scale(settings.usual):g}, which differs from the run's "
            f"{lora_scale(lora):g}",
            _remedy(settings, lora, max(lora.rank, settings.usual.rank)),
        )
    file = open_safetensors(folder / TENSORS_NAME)
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrapped = any(name.startswith(f"base_model.model.{MODULES_INSIDE}") for name in found)
    modules = adapted_modules(student, wrapped, are_joined(student, found))
    _check_tensors(folder / TENSORS_NAME, modules, settings, found)
    stacks = _stacks(folder / TENSORS_NAME, file, student, modules, settings, lora)
    _check_chosen(folder / TENSORS_NAME, student.config, lora, stacks)
    leaves = {}
    for path, variable in student.lora.flat_state():
        like, stacked = variable.get_raw_value(), stacks[path]
        where = None
        if mesh is not None:
            where = sharding.array_sharding(mesh, variable.get_metadata()["axes"], like.shape)
        leaves[path] = variable.replace(jax.device_put(stacked, where))
    return nnx.State.from_flat_path(leaves)


def _check_tensors(
    path: Path,
    modules: list[AdaptedModule],
    settings: AdapterSettings,
    found: dict[str, tuple[int, ...]],
) -> None:
    """A file must have these modules' tensors, no others, in the settings' ranks."""
    expected = {
        module.tensor(factor): module.shape(factor, settings.of(module.key).rank)
        for module in modules
        for factor in FACTORS
    }
    for names, what in (
        (expected.keys() - found.keys(), "is missing"),
        (found.keys() - expected.keys(), "fits no adapter of this student"),
    ):
        if names:
            raise UserError(
                f"{path}: tensor {min(names)!r} {what}",
                "set lora.targets to the modules that this adapter was trained on",
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {list(found[name])}, expected {list(shape)}",
                "use an adapter that was trained on this student",
            )


def _stacks(
    path: Path,
    file: Any,
    student: Student,
    modules: list[AdaptedModule],
    settings: AdapterSettings,
    lora: LoraConfig,
) -> dict[tuple[Any, ...], np.ndarray]:
    """The values of all the student's adapters, by path, at the run's rank and scale."""
    stacks = {
        name: np.zeros(variable.get_raw_value().shape, np.float32)
        for name, variable in student.lora.flat_state()
    }
    rng = np.random.default_rng(0)
    for module in modules:
        own = settings.of(module.key)
        a, b = (module.unpack(factor, file.get_tensor(module.tensor(factor))) for factor in FACTORS)
        parts = _parts(a, b, len(module.linears), lora.rank)
        if parts is None:
            why = ", and gate_proj and up_proj share its ranks" if len(module.linears) > 1 else ""
            raise UserError(
                f"{path}: tensor {module.tensor('lora_a')!r} is of rank "
                f"{own.rank}, more than the run's {lora.rank}{why}",
                _remedy(settings, lora, max(settings.of(m.key).rank for m in modules)),
            )
        quotient = np.float32(lora_scale(own) / lora_scale(lora))
        for linear, (part_a, part_b) in zip(module.linears, parts, strict=True):
            stack_a, stack_b = (stacks[*linear, factor][module.place] for factor in FACTORS)
            rank = part_a.shape[-1]
            stack_a[..., :rank] = part_a
            # With zeros in A as well as in B, neither would ever receive a gradient.
            bound = module.in_features**-0.5
            stack_a[..., rank:] = rng.uniform(-bound, bound, stack_a[..., rank:].shape)
            stack_b[..., :rank, :] = part_b * quotient
    return stacks


def _parts(
    a: np.ndarray, b: np.ndarray, number: int, rank: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """A and B of each of ``number`` linears whose outputs lie side by side in one module.

    Each has all of A, and of B its own columns.  If those are more ranks than ``rank``, but every
    linear uses ranks of its own, as when PEFT has just joined them, it has these alone.

    Args:
      a: [..., in, ranks].
      b: [..., ranks, number x out].
      number: of linears.
      rank: how many ranks a linear can have.

    Returns:
      As many A [..., in, at most rank] and B; None if that is too few ranks.
    """
    columns = np.split(b, number, axis=-1)
    if a.shape[-1] <= rank:
        return [(a, column) for column in columns]
    if number == 1 or a.shape[-1] % number or a.shape[-1] > number * rank:
        return None
    blocks = [np.split(column, number, axis=-2) for column in columns]
    if any(blocks[i][j].any() for i, j in np.ndindex(number, number) if i != j):
        return None
    return [(own, blocks[i][i]) for i, own in enumerate(np.split(a, number, axis=-1))]


def _remedy(settings: AdapterSettings, lora: LoraConfig, rank: int) -> str:
    """How the run gets a rank, and the adapter's scale at that rank."""
    per_alpha = lora_scale(dataclasses.replace(lora, rank=rank, alpha=1.0))
    alpha = lora_scale(settings.usual) / per_alpha
    return f"set config.lora.rank={rank} and config.lora.alpha={alpha!r}"


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


def _scaling(student: Student, lora: LoraConfig) -> dict[str, Any]:
    alpha, stabilised = lora.alpha, lora.rank_stabilised
    if stabilised and any(half in adapted_linears(student) for half in HALVES):
        # When PEFT joins these, it doubles r and alpha, and so changes alpha / sqrt(r).
        alpha, stabilised = lora_scale(lora) * lora.rank, False
    return {
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": stabilised,
    }


def _targets(student: Student, wrapped: bool) -> dict[str, Any]:
    linears = adapted_linears(student)
    parameters = [linear for linear in linears if is_parameter(student, linear)]
    if any(linear.startswith("mlp.") for linear in linears) and student.config.sparse_layers:
        raise UserError(
            "config.lora.targets: PEFT takes gate_proj, up_proj and down_proj of this student for "
            "its experts' and leaves out those of its plain MLPs",
            "export the merged weights, or do not adapt mlp... of a student with experts",
        )
    if len(set(linears) & set(HALVES)) == 1:
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
