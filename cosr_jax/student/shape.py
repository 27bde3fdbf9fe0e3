"""The student's shape: what a Hugging Face config.json says, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cosr_jax.student.families import MoeConfig, read_options, with_defaults
from cosr_jax.student.keys import REMEDY, flag, number, whole
from cosr_jax.student.rope import RopeScaling, Scaling, inverse_frequencies
from cosr_jax.types import UserError

__all__ = ["ModelConfig", "MoeConfig", "RopeScaling"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder: a Llama, and by how much another family differs from it.

    The first fields are in the terms of a Hugging Face config.json; each option's default is
    Llama's.
    """

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
    rope_scaling: Scaling | None = None  # None for plain RoPE
    activation: str = "silu"  # of the MLP's gate; or "gelu_pytorch_tanh"
    qkv_bias: bool = False  # on the query, key and value projections
    output_bias: bool = False  # on attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # norms over each head of queries and keys, before rotation
    query_scalar: float = 0.0  # scores are divided by its square root; 0.0: head_dim
    attention_sinks: bool = False  # a logit per head that takes weight and adds nothing
    sliding_window: int = 0  # tokens, the query's own included, that a sliding layer sees
    sliding_layers: tuple[int, ...] = ()
    sliding_rope_theta: float = 0.0  # plain RoPE of the sliding layers; 0.0: that of all layers
    unrotated_layers: tuple[int, ...] = ()  # layers without positions (NoPE, arXiv:2305.19466)
    post_norms: bool = False  # norms also after attention and MLP, before the residual sum
    norm_offset: float = 0.0  # norms multiply by weight + offset
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0  # logits become cap tanh(logit / cap); 0.0: off
    moe: MoeConfig | None = None  # None: every layer has a plain MLP

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the content of a config.json (transformers 4 or 5 spelling).

        Raises:
          UserError: another architecture, a missing key, or an option that is not supported.
        """
        values = with_defaults(values)
        try:
            heads = whole(values, "num_attention_heads")
            config = cls(
                vocab_size=whole(values, "vocab_size"),
                hidden_size=whole(values, "hidden_size"),
                intermediate_size=whole(values, "intermediate_size"),
                num_hidden_layers=whole(values, "num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=whole(values, "num_key_value_heads", heads),
                head_dim=whole(values, "head_dim", whole(values, "hidden_size") // heads),
                rms_norm_eps=number(values, "rms_norm_eps", 1e-6),
                tie_word_embeddings=flag(values, "tie_word_embeddings"),
                **read_options(values),
            )
        except KeyError as error:
            raise UserError(f"config.json: key {error} is missing", REMEDY) from error
        if config.head_dim % 2:
            raise UserError(
                f"config.json: head_dim {config.head_dim} is odd, and rotation turns pairs", REMEDY
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"config.json: num_key_value_heads {config.num_key_value_heads} does not divide "
                f"num_attention_heads {config.num_attention_heads}",
                REMEDY,
            )
        return config

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a plain MLP."""
        layers = tuple(range(self.num_hidden_layers))
        return layers if self.moe is None else self.moe.dense_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with a mixture of experts."""
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.dense_layers)

    def inverse_frequencies(self) -> np.ndarray:
        """RoPE's frequencies, float32 [head_dim / 2], of layers that do not slide."""
        return inverse_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    def rotations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The kinds of rotation among the layers.

        Returns:
          Frequencies float32 [kinds, head_dim / 2], factors on cosines and sines float32 [kinds],
          and each layer's kind int32 [layers].
        """
        factor = getattr(self.rope_scaling, "attention_factor", 1.0)
        kinds = [(self.inverse_frequencies(), factor)]
        of_layer = np.zeros(self.num_hidden_layers, np.int32)
        if self.sliding_rope_theta:
            of_layer[list(self.sliding_layers)] = len(kinds)
            kinds.append((inverse_frequencies(self.sliding_rope_theta, self.head_dim, None), 1.0))
        if self.unrotated_layers:
            of_layer[list(self.unrotated_layers)] = len(kinds)
            kinds.append((np.zeros(self.head_dim // 2, np.float32), 1.0))  # turns by nothing
        frequencies, factors = zip(*kinds, strict=True)
        return np.stack(frequencies), np.array(factors, np.float32), of_layer

    def windows(self) -> np.ndarray | None:
        """How many tokens each layer sees back, int32 [layers]; None where all see everything."""
        if not self.sliding_layers:
            return None
        windows = np.full(self.num_hidden_layers, np.iinfo(np.int32).max, np.int32)
        windows[list(self.sliding_layers)] = self.sliding_window
        return windows
