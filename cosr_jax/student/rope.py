"""Rotary position embeddings (arXiv:2104.09864): frequencies under each kind of scaling.

A head's coordinates i and i + head_dim / 2 are turned together by position * frequency[i].
"""

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

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Long wavelengths stretched by ``factor``, short ones kept, those between blended.

        The blend is linear in the number of turns within the original context, as Llama 3.1 does
        (facebook's ``apply_scaling``; transformers ``_compute_llama3_parameters``).
        """
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Every wavelength stretched alike (Gemma 3's global layers)."""

    factor: float

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Frequencies divided by ``factor``."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): a blend between two numbers of turns, and hotter attention."""

    factor: float
    original_max_position_embeddings: float  # tokens
    beta_fast: float = 32.0  # turns in the original context above which frequencies are kept
    beta_slow: float = 1.0  # turns below which they are stretched by ``factor``
    truncate: bool = True  # the blend begins and ends at whole coordinates
    attention_factor: float = 1.0  # on cosines and sines, so its square is on the scores

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Frequencies [head_dim / 2] kept, stretched, or blended linearly by coordinate between."""
        half = len(frequencies)

        def coordinate(turns: float) -> float:
            """Where a frequency makes so many turns in the original context."""
            wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return half * math.log(wave) / math.log(theta)

        low, high = coordinate(self.beta_fast), coordinate(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        # Where both ends meet the blend is a step; its width must not be zero.
        ramp = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0.0, 1.0)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp


Scaling = RopeScaling | LinearScaling | YarnScaling


def read_scaling(rope: Mapping[str, Any], max_positions: float | None) -> Scaling | None:
    """The scaling that a config.json's rope section (transformers 4 or 5 spelling) names.

    Args:
      rope: the section; empty for plain RoPE.
      max_positions: the student's max_position_embeddings, where the section leaves out the
        original context.

    Raises:
      UserError: a kind that is not supported.
      KeyError: a number is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(float(rope["factor"]))
    if kind not in ("llama3", "yarn"):
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported",
            "use a student with 'default', 'linear', 'llama3' or 'yarn'",
        )
    original = rope.get("original_max_position_embeddings") or max_positions
    if original is None:
        raise KeyError("original_max_position_embeddings")
    original = float(original)
    factor = float(rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            factor, float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
        )
    return YarnScaling(
        factor,
        original,
        float(rope.get("beta_fast") or 32.0),
        float(rope.get("beta_slow") or 1.0),
        bool(rope.get("truncate", True)),
        _yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """As given, else 0.1 log(factor) + 1, with DeepSeek's two weights where both are given."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)

    def heat(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    return heat(weight) / heat(all_dims) if weight and all_dims else heat(1.0)


def inverse_frequencies(theta: float, head_dim: int, scaling: Scaling | None) -> np.ndarray:
    """float32 [head_dim / 2] (arXiv:2104.09864, section 3.2.2), scaled."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, theta)
    return frequencies.astype(np.float32)
