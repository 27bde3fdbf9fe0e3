"""Hugging Face's tensor names of a student's variables."""

from __future__ import annotations

import dataclasses
from typing import Any

from cosr_jax.student.shape import ModelConfig

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class HfName:
    """The tensor(s) behind one variable."""

    template: str  # with "{layer}" and "{expert}" where the variable is stacked over them
    transposed: bool = False  # Hugging Face stores linears as [out, in]
    layers: tuple[int, ...] = ()  # numbers of the stacked layers

    @property
    def stacks(self) -> int:
        """Leading axes of the variable whose entries are tensors of their own."""
        return ("{layer}" in self.template) + ("{expert}" in self.template)

    def tensor(self, place: tuple[int, ...]) -> str:
        """The tensor at a place on those axes: (), (row,) or (row, expert)."""
        if not place:
            return self.template
        return self.template.format(layer=self.layers[place[0]], expert=place[-1])


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Every linear that may have an adapter, e.g. "attn.q_proj"; "moe." is all experts'."""
    names = [f"attn.{part}_proj" for part in "qkvo"]
    if config.dense_layers:
        names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    if config.moe is not None:
        parts = ("gate_up", "down") if config.moe.clamped else ("gate", "up", "down")
        names += [f"moe.{part}_proj" for part in parts]
    return tuple(names)


def hf_module(config: ModelConfig, linear: str) -> str:
    """A linear's module, e.g. "attn.q_proj" -> "model.layers.{layer}.self_attn.q_proj".

    Experts have modules of their own, except gpt-oss', which are parameters of one module.
    """
    part, name = linear.split(".")
    packed = config.moe is not None and config.moe.clamped
    experts = "mlp.experts" if packed else "mlp.experts.{expert}"
    module = {"attn": "self_attn", "mlp": "mlp", "moe": experts}[part]
    return f"model.layers.{{layer}}.{module}.{name}"


def linear_layers(config: ModelConfig, linear: str) -> tuple[int, ...]:
    """Numbers of the layers that have a linear, or another part of "attn.", "mlp." or "moe."."""
    part = linear.split(".")[0]
    every = tuple(range(config.num_hidden_layers))
    return {"attn": every, "mlp": config.dense_layers, "moe": config.sparse_layers}[part]


def hf_names(config: ModelConfig) -> dict[Path, HfName]:
    """Path in the base state -> what it is called in a Hugging Face folder."""
    names: dict[Path, HfName] = {
        ("embed",): HfName("model.embed_tokens.weight"),
        ("norm", "weight"): HfName("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        names["lm_head",] = HfName("lm_head.weight", transposed=True)

    def add(path: str, tensor: str, transposed: bool = False) -> None:
        layers = linear_layers(config, path)
        names["layers", *path.split(".")] = HfName(tensor, transposed, layers)

    in_layer = "model.layers.{layer}."
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    every = tuple(range(config.num_hidden_layers))
    for path, module in norms.items():
        names["layers", *path.split("."), "weight"] = HfName(
            f"{in_layer}{module}.weight", layers=every
        )
    if config.attention_sinks:
        add("attn.sinks", f"{in_layer}self_attn.sinks")
    packed = config.moe is not None and config.moe.clamped
    has_bias = {
        **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), config.qkv_bias),
        "attn.o_proj": config.output_bias,
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), config.mlp_bias),
        "moe.gate_up_proj": packed,
        "moe.down_proj": packed,
    }
    for linear in linear_names(config):
        module = hf_module(config, linear)
        is_packed = packed and linear.startswith("moe.")
        weight, bias = (
            (module, f"{module}_bias")
            if is_packed
            else (
                f"{module}.weight",
                f"{module}.bias",
            )
        )
        add(f"{linear}.kernel", weight, transposed=not is_packed)
        if has_bias.get(linear):
            add(f"{linear}.bias", bias)
    if config.moe is not None:
        router = f"{in_layer}mlp.{'router' if packed else 'gate'}"
        add("moe.router.kernel", f"{router}.weight", transposed=True)
        if packed:
            add("moe.router.bias", f"{router}.bias")
    return names
