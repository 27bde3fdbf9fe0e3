"""Hugging Face's tensor names of a student's variables."""

from __future__ import annotations

import dataclasses
from typing import Any

from cosr_jax.student.shape import ModelConfig

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class HfName:
    """The tensor(s) behind one variable."""

    template: str  # with "{layer}" where the variable is stacked over layers
    transposed: bool = False  # Hugging Face stores linears as [out, in]
    layers: tuple[int, ...] | None = None  # numbers of the stacked layers

    def tensor(self, row: int | None) -> str:
        """The tensor of one row of the stack; None for a variable that is not stacked."""
        return self.template if self.layers is None else self.template.format(layer=self._at(row))

    def _at(self, row: int | None) -> int:
        assert self.layers is not None and row is not None
        return self.layers[row]


def hf_module(linear: str) -> str:
    """A linear's module: "attn.q_proj" -> "model.layers.{layer}.self_attn.q_proj"."""
    return f"model.layers.{{layer}}.{linear.replace('attn.', 'self_attn.')}"


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Every linear that may have an adapter, e.g. "attn.q_proj"."""
    names = [f"attn.{part}_proj" for part in "qkvo"]
    if config.dense_layers:
        names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return tuple(names)


def hf_names(config: ModelConfig) -> dict[Path, HfName]:
    """Path in the base state -> what it is called in a Hugging Face folder."""
    every = tuple(range(config.num_hidden_layers))
    names: dict[Path, HfName] = {
        ("embed",): HfName("model.embed_tokens.weight"),
        ("norm", "weight"): HfName("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        names["lm_head",] = HfName("lm_head.weight", transposed=True)

    def add(path: str, tensor: str, transposed: bool = False, layers: tuple[int, ...] = every):
        names["layers", *path.split(".")] = HfName(tensor, transposed, layers)

    def norm(path: str, module: str) -> None:
        add(f"{path}.weight", f"model.layers.{{layer}}.{module}.weight")

    norm("attn_norm", "input_layernorm")
    if config.post_norms:
        norm("attn_post_norm", "post_attention_layernorm")
        norm("mlp_norm", "pre_feedforward_layernorm")
        norm("mlp_post_norm", "post_feedforward_layernorm")
    else:
        norm("mlp_norm", "post_attention_layernorm")
    if config.qk_norm:
        norm("attn.q_norm", "self_attn.q_norm")
        norm("attn.k_norm", "self_attn.k_norm")
    if config.attention_sinks:
        add("attn.sinks", "model.layers.{layer}.self_attn.sinks")
    has_bias = {
        **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), config.qkv_bias),
        "attn.o_proj": config.output_bias,
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), config.mlp_bias),
    }
    for linear in linear_names(config):
        layers = every if linear.startswith("attn.") else config.dense_layers
        add(f"{linear}.kernel", f"{hf_module(linear)}.weight", True, layers)
        if has_bias[linear]:
            add(f"{linear}.bias", f"{hf_module(linear)}.bias", False, layers)
    return names
