"""Which tensors PEFT's files have for a student's adapters, and how they are laid out.

A linear has A [rank, in] and B [out, rank], the transposes of ours.  A parameter that holds all
experts of a layer has one A [experts x rank, in], expert by expert, and one B
[out, rank x experts], rank by rank (PEFT's ``ParamWrapper.get_delta_factors``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from cosr_jax.student.model import Student
from cosr_jax.student.names import hf_module, linear_layers
from cosr_jax.student.text_part import inside
from cosr_jax.types import UserError

FACTORS = ("lora_a", "lora_b")
#: What PEFT, beside transformers 5, adapts as one parameter with A in common.
HALVES = ("moe.gate_proj", "moe.up_proj")


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """What PEFT adapts with one A and one B."""

    name: str  # whose tensors the file has; a parameter's are named after what is around it
    key: str  # its own name, which patterns for ranks and scales see
    linears: tuple[tuple[Any, ...], ...]  # paths of ours, whose outputs lie side by side in it
    place: tuple[int, ...]  # leading indices into their stacks: (row,) or (row, expert)
    experts: tuple[int, ...]  # (number,) of a parameter that holds them all, else ()
    in_features: int
    out_features: int

    def tensor(self, factor: str) -> str:
        """Name of its A ("lora_a") or B ("lora_b")."""
        return f"base_model.model.{self.name}.lora_{factor[-1].upper()}.weight"

    def shape(self, factor: str, rank: int) -> tuple[int, int]:
        """In the file: [ranks, in] or [out, ranks], counting all experts' ranks."""
        ranks = rank * (self.experts[0] if self.experts else 1)
        return (ranks, self.in_features) if factor == "lora_a" else (self.out_features, ranks)

    def pack(self, factor: str, value: np.ndarray) -> np.ndarray:
        """From our layout, [in, rank] or [rank, out] after the experts, to the file's."""
        order = {2: (1, 0), 3: (0, 2, 1) if factor == "lora_a" else (2, 1, 0)}[value.ndim]
        rank = value.shape[-1 if factor == "lora_a" else -2]
        return np.ascontiguousarray(value.transpose(order).reshape(self.shape(factor, rank)))

    def unpack(self, factor: str, value: np.ndarray) -> np.ndarray:
        """From the file's layout to ours."""
        if not self.experts:
            return value.T
        if factor == "lora_a":
            return value.reshape(*self.experts, -1, self.in_features).transpose(0, 2, 1)
        return value.reshape(self.out_features, -1, *self.experts).transpose(2, 1, 0)


def linear_name(path: tuple[Any, ...]) -> str:
    """("layers", "attn", "q_proj", "lora_a") -> "attn.q_proj"."""
    return ".".join(path[1:-1])


def adapted_linears(student: Student) -> list[str]:
    """Every linear that has an adapter, e.g. "attn.q_proj"."""
    return sorted({linear_name(path) for path, _ in student.lora.flat_state()})


def is_parameter(student: Student, linear: str) -> bool:
    """Whether a linear of all experts is one parameter in every file (gpt-oss)."""
    moe = student.config.moe
    return linear.startswith("moe.") and moe is not None and moe.clamped


def are_joined(student: Student, tensors: Iterable[str]) -> bool:
    """Whether a file has experts as parameters that other files have one by one (Qwen3-MoE)."""
    around = (".mlp.experts.lora_", ".mlp.experts.base_layer.lora_")
    moe = student.config.moe
    return (
        moe is not None
        and not moe.clamped
        and any(part in tensor for tensor in tensors for part in around)
    )


def adapted_modules(student: Student, wrapped: bool, joined: bool = False) -> list[AdaptedModule]:
    """All of a student's adapters as a file of PEFT's has them.

    Args:
      student: concrete or abstract.
      wrapped: whether it is the text model inside the base model (``text_part``).
      joined: whether experts that could be modules of their own are parameters (``are_joined``).

    Raises:
      UserError: the file joins what the student adapts by half.
    """
    shapes = {path: v.get_raw_value().shape for path, v in student.lora.flat_state()}
    parts: dict[str, tuple[str, ...]] = {linear: (linear,) for linear in adapted_linears(student)}
    if joined and any(half in parts for half in HALVES):
        if not all(half in parts for half in HALVES):
            raise UserError(
                "config.lora.targets: the adapter joins gate_proj and up_proj of the experts, of "
                "which the run adapts only one",
                "add the other of moe.gate_proj and moe.up_proj to config.lora.targets",
            )
        parts = {linear: part for linear, part in parts.items() if linear not in HALVES}
        parts["moe.gate_up_proj"] = HALVES
    modules = []
    for target, part in parts.items():
        paths = tuple(("layers", *linear.split(".")) for linear in part)
        *stack, in_features, _ = shapes[*paths[0], "lora_a"]
        out_features = len(paths) * shapes[*paths[0], "lora_b"][-1]
        name = key = hf_module(student.config, target)
        if is_parameter(student, target) or (joined and target.startswith("moe.")):
            # PEFT wraps the module once for each parameter: the first one lies innermost.
            key = key.replace(".{expert}", "")
            is_inner = target != "moe.down_proj" and "moe.down_proj" in parts
            name = key.rpartition(".")[0] + (".base_layer" if is_inner else "")
        if wrapped:
            name, key = inside(name), inside(key)
        places = 1 + ("{expert}" in key)
        layers = linear_layers(student.config, target)
        for place in np.ndindex(*stack[:places]):
            numbers = {"layer": layers[place[0]], "expert": place[-1]}
            modules.append(
                AdaptedModule(
                    name=name.format(**numbers),
                    key=key.format(**numbers),
                    linears=paths,
                    place=place,
                    experts=tuple(stack[places:]),
                    in_features=in_features,
                    out_features=out_features,
                )
            )
    return modules
