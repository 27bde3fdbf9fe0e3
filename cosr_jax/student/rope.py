"""Rotary position embeddings (arXiv:2104.09864): frequencies under each kind of scaling.

A head's coordinates i and i + head_dim / 2 are turned together by position * frequency[i].
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cosr_jax.student.keys import REMEDY, Values, flag, number, positive
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


def read_scaling(rope: Values, values: Values) -> Scaling | None:
    """The scaling that a config.json's rope section (transformers 4 or 5 spelling) names.

    Args:
      rope: the section; empty for plain RoPE.
      values: the whole file, whose max_position_embeddings stands for an original context that the
        section leaves out.

    Raises:
      UserError: a kind that is not supported, or a number that cannot be.
      KeyError: a number is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if number(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported",
            "use a student whose heads are rotated whole",
        )
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(positive(rope, "factor"))
    if kind not in ("llama3", "yarn"):
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported",
            "use a student with 'default', 'linear', 'llama3' or 'yarn'",
        )
    original = "original_max_position_embeddings"
    if rope.get(original) is None and values.get("max_position_embeddings") is not None:
        rope = {**rope, original: values["max_position_embeddings"]}
    context = positive(rope, original)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if high <= low:
            raise UserError(
                f"config.json: high_freq_factor {high} is not above low_freq_factor {low}", REMEDY
            )
        return RopeScaling(positive(rope, "factor"), low, high, context)
    if "factor" in rope and rope["factor"] is None:
        rope = {**rope, "factor": positive(values, "max_position_embeddings") / context}
    return YarnScaling(
        positive(rope, "factor"),
        context,
        number(rope, "beta_fast", 0.0) or 32.0,
        number(rope, "beta_slow", 0.0) or 1.0,
        flag(rope, "truncate", True),
        _yarn_attention_factor(rope, positive(rope, "factor")),
    )


def _yarn_attention_factor(rope: Values, factor: float) -> float:
    """As given, else 0.1 log(factor) + 1, with DeepSeek's two weights where both are given."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")

    def heat(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, all_dims = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    return heat(weight) / heat(all_dims) if weight and all_dims else heat(1.0)


def inverse_frequencies(theta: float, head_dim: int, scaling: Scaling | None) -> np.ndarray:
    """float32 [head_dim / 2] (arXiv:2104.09864, section 3.2.2), scaled."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, theta)
    return frequencies.astype(np.float32)
