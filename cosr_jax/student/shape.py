"""The student's shape: what a Hugging Face config.json says, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cosr_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of RoPE for long contexts, in the terms of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder, in the terms of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None  # None for plain RoPE

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the content of a config.json (transformers 4 or 5 spelling).

        Raises:
          UserError: another architecture, a missing key, or an option that is not supported.
        """
        if values.get("model_type") != "llama":
            raise UserError(
                f"config.json: model_type {values.get('model_type')!r} is not supported",
                "use a Llama-family student (model_type 'llama', e.g. SmolLM2 or Llama 3)",
            )
        for key, wanted in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if values.get(key, wanted) != wanted:
                raise UserError(
                    f"config.json: {key} {values[key]!r} is not supported",
                    f"use a student with {key} {wanted!r}",
                )
        try:
            rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", "llama3"):
                raise UserError(
                    f"config.json: rope_type {kind!r} is not supported", "use 'default' or 'llama3'"
                )
            heads = int(values["num_attention_heads"])
            config = cls(
                vocab_size=int(values["vocab_size"]),
                hidden_size=int(values["hidden_size"]),
                intermediate_size=int(values["intermediate_size"]),
                num_hidden_layers=int(values["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(values.get("num_key_value_heads") or heads),
                head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
                rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
                rope_theta=float(values.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                rope_scaling=None
                if kind == "default"
                else RopeScaling(
                    **{f.name: float(rope[f.name]) for f in dataclasses.fields(RopeScaling)}
                ),
            )
        except KeyError as error:
            raise UserError(
                f"config.json: key {error} is missing", "take the file that came with the weights"
            ) from error
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"config.json: a value is of the wrong kind ({error})",
                "take the file that came with the weights",
            ) from error
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            if getattr(config, name) < 1:
                raise UserError(
                    f"config.json: {name} {getattr(config, name)} is under 1",
                    "take the file that came with the weights",
                )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"config.json: num_key_value_heads {config.num_key_value_heads} does not divide "
                f"num_attention_heads {config.num_attention_heads}",
                "take the file that came with the weights",
            )
        return config

    def inverse_frequencies(self) -> np.ndarray:
        """RoPE's frequencies, float32 [head_dim / 2] (arXiv:2104.09864, section 3.2.2).

        With ``rope_scaling``, long wavelengths are stretched by ``factor``, short ones kept, and
        those between blended linearly in the number of turns within the original context, as
        Llama 3.1 does (facebook's ``apply_scaling``; transformers ``_compute_llama3_parameters``).
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        frequencies = 1.0 / self.rope_theta**exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies.astype(np.float32)
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        stretched = frequencies / scaling.factor
        return (keep * frequencies + (1 - keep) * stretched).astype(np.float32)
