"""What PEFT's ``adapter_config.json`` says about adapters: their ranks and their scales.

PEFT's classes are huggingface/peft's ``src/peft/tuners/lora/config.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosr_jax.config import LoraConfig
from cosr_jax.student.tensor_files import read_json
from cosr_jax.types import UserError

#: Settings of which another value is another computation than x W + scale (x A) B on the base
#: model's own W.
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
#: Start values that PEFT takes out of W, so that the adapter fits no other W.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Rank and scale of each module's adapter."""

    usual: LoraConfig  # of every module that no pattern names
    ranks: Mapping[str, int]  # by regular expression
    alphas: Mapping[str, float]

    def of(self, module: str) -> LoraConfig:
        """Those of one module, e.g. "model.layers.0.self_attn.q_proj"."""
        return dataclasses.replace(
            self.usual,
            rank=_first(self.ranks, module, self.usual.rank),
            alpha=_first(self.alphas, module, self.usual.alpha),
        )


def read_settings(path: Path) -> AdapterSettings:
    """The settings in an ``adapter_config.json``.

    Raises:
      UserError: the file cannot be read, a value is missing or of the wrong kind, or the adapter
        is no plain LoRA.
    """
    values = read_json(path)
    for key in ("peft_type", "r", "lora_alpha"):
        if values.get(key) is None:
            raise UserError(f"{path}: key {key!r} is missing", "get the adapter's files again")
    for key, plain in _PLAIN.items():
        found = values.get(key, plain)
        if (found or None) != (plain or None):
            raise UserError(
                f"{path}: {key} {found!r:.100} differs from plain LoRA's {plain!r}",
                "use an adapter that was trained as plain LoRA",
            )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights {start!r} changed the base model's weights",
            "save the adapter in PEFT with path_initial_model_for_weight_conversion",
        )
    stabilised = values.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise _wrong(path, "use_rslora", stabilised)
    ranks, alphas = (_patterns(path, values, key) for key in ("rank_pattern", "alpha_pattern"))
    for key, rank in [("r", values["r"]), *(("rank_pattern", rank) for rank in ranks.values())]:
        if not _is_positive(rank) or rank % 1:
            raise _wrong(path, key, rank)
    for key, alpha in [
        ("lora_alpha", values["lora_alpha"]),
        *(("alpha_pattern", alpha) for alpha in alphas.values()),
    ]:
        if not _is_positive(alpha):
            raise _wrong(path, key, alpha)
    usual = LoraConfig(
        rank=int(values["r"]), alpha=float(values["lora_alpha"]), rank_stabilised=stabilised
    )
    return AdapterSettings(usual, {key: int(rank) for key, rank in ranks.items()}, alphas)


def _patterns(path: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong(path, key, found)
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{path}: {key} {pattern!r} is no regular expression ({error})",
                "get the adapter's files again",
            ) from error
    return found


def _first(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Of the first pattern that fits the module's name or an end of it that follows a dot, as in
    PEFT's ``get_pattern_key``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _wrong(path: Path, key: str, value: Any) -> UserError:
    return UserError(f"{path}: {key} cannot be {value!r:.100}", "get the adapter's files again")
