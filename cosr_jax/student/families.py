"""What each family's config.json says beyond the common keys, as options of ``ModelConfig``.

Keys and defaults are those of transformers' configuration classes; a value that would change the
computation in a way that is not supported is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cosr_jax.student.rope import read_scaling
from cosr_jax.types import UserError

Values = Mapping[str, Any]
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP: each token goes to its router's best few."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    normalised: bool  # the chosen experts' probabilities are divided by their sum
    dense_layers: tuple[int, ...] = ()  # layers that keep a plain MLP
    #: gpt-oss: the router and all linears have biases, gate and up are one product whose columns
    #: alternate, and the gate is clamped.
    clamped: bool = False
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702


def with_defaults(values: Values) -> Values:
    """``values`` and what their family's configuration class adds for keys left out.

    Raises:
      UserError: an unknown family.
    """
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise UserError(
            f"config.json: model_type {family!r} is not supported",
            f"use a student of a supported family: {', '.join(_FAMILIES)}",
        )
    return {**_FAMILIES[family][0], **values}


def read_options(values: Values) -> dict[str, Any]:
    """Options of ``ModelConfig`` that differ between families, from complete ``values``.

    Raises:
      UserError: a value that is not supported.
      KeyError: a key that the family needs is missing.
    """
    key = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    activation = values.get(key, "silu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: {key} {activation!r} is not supported",
            f"use a student with one of {', '.join(ACTIVATIONS)}",
        )
    packing = (values.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if packing != "mxfp4":
        raise UserError(
            f"config.json: quantization_config of quant_method {packing!r} is not supported",
            "use the weights that were not quantised, or MXFP4",
        )
    return {"activation": activation, **_FAMILIES[values["model_type"]][1](values)}


def _llama(values: Values) -> dict[str, Any]:
    bias = bool(values.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(values.get("mlp_bias", False)),
        **_plain_rope(values),
    }


def _qwen2(values: Values) -> dict[str, Any]:
    first = int(values.get("max_window_layers", 28))
    layers = range(int(values["num_hidden_layers"]))
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in layers]
    return {"qkv_bias": True, **_plain_rope(values), **_optional_window(values, kinds)}


def _qwen3(values: Values) -> dict[str, Any]:
    bias = bool(values.get("attention_bias", False))
    return {**_qwen2(values), "qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen3_moe(values: Values) -> dict[str, Any]:
    layers = range(int(values["num_hidden_layers"]))
    plain = values.get("mlp_only_layers") or ()
    step = int(values.get("decoder_sparse_step", 1))
    dense = tuple(i for i in layers if i in plain or (i + 1) % step)
    moe = MoeConfig(
        num_experts=_experts(values),
        experts_per_token=int(values["num_experts_per_tok"]),
        intermediate_size=int(values["moe_intermediate_size"]),
        normalised=bool(values.get("norm_topk_prob", False)),
        dense_layers=dense,
    )
    return {
        **_qwen3(values),
        **_optional_window(values, ["sliding_attention"] * len(layers)),
        "moe": None if len(dense) == len(layers) else moe,
    }


def _smollm3(values: Values) -> dict[str, Any]:
    layers = range(int(values["num_hidden_layers"]))
    turned = values.get("no_rope_layers")  # despite its name: 1 where positions are rotated
    if turned is None:
        interval = int(values.get("no_rope_layer_interval", 4))
        turned = [(layer + 1) % interval != 0 for layer in layers]
    if len(turned) < len(layers):
        raise UserError(
            f"config.json: no_rope_layers has {len(turned)} entries for {len(layers)} layers",
            "take the file that came with the weights",
        )
    kinds = ["full_attention" if turned[layer] else "sliding_attention" for layer in layers]
    return {
        **_llama(values),
        **_optional_window(values, kinds),
        "unrotated_layers": tuple(layer for layer in layers if not turned[layer]),
    }


def _gemma3(values: Values) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention true is not supported", "use a causal student"
        )
    bias = bool(values.get("attention_bias", False))
    sections = values.get("rope_parameters") or {}
    far = {**(values.get("rope_scaling") or {}), **(sections.get("full_attention") or {})}
    near = sections.get("sliding_attention") or {}
    if read_scaling(near, values.get("max_position_embeddings")) is not None:
        raise UserError(
            "config.json: rope_type of sliding_attention other than 'default' is not supported",
            "use a student whose sliding layers have plain RoPE",
        )
    pattern = int(values.get("sliding_window_pattern") or 6)
    layers = range(int(values["num_hidden_layers"]))
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in layers]
    # attn_logit_softcapping is left out: transformers' Gemma 3 does not apply it either.
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "rope_theta": float(far.get("rope_theta") or values.get("rope_theta") or 1e6),
        "rope_scaling": read_scaling(far, values.get("max_position_embeddings")),
        "sliding_rope_theta": float(
            near.get("rope_theta") or values.get("rope_local_base_freq") or 1e4
        ),
        **_window(values, kinds),
        "query_scalar": float(values["query_pre_attn_scalar"]),
        "logit_softcap": float(values.get("final_logit_softcapping") or 0.0),
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": float(values["hidden_size"]) ** 0.5,
    }


def _gpt_oss(values: Values) -> dict[str, Any]:
    bias = bool(values["attention_bias"])
    layers = range(int(values["num_hidden_layers"]))
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    moe = MoeConfig(
        num_experts=_experts(values),
        experts_per_token=int(values["num_experts_per_tok"]),
        intermediate_size=int(values["intermediate_size"]),
        normalised=True,
        clamped=True,
        swiglu_limit=float(values["swiglu_limit"]),
        swiglu_alpha=float(values["swiglu_alpha"]),
    )
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_sinks": True,
        **_plain_rope(values),
        **_window(values, kinds),
        "moe": moe,
    }


def _plain_rope(values: Values) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = values.get("rope_theta") or rope.get("rope_theta") or values["default_rope_theta"]
    return {
        "rope_theta": float(theta),
        "rope_scaling": read_scaling(rope, values.get("max_position_embeddings")),
    }


def _optional_window(values: Values, kinds: list[str]) -> dict[str, Any]:
    """The sliding layers of a family that has them only where use_sliding_window is set."""
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return {"sliding_window": 0, "sliding_layers": ()}
    return _window(values, kinds)


def _window(values: Values, kinds: list[str]) -> dict[str, Any]:
    """Which layers see only the last tokens; ``kinds`` where layer_types does not say."""
    kinds = list(values.get("layer_types") or kinds)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"config.json: layer_types {kind!r} is not supported",
                "use a student of full_attention and sliding_attention layers",
            )
    if len(kinds) != int(values["num_hidden_layers"]):
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries for "
            f"{values['num_hidden_layers']} layers",
            "take the file that came with the weights",
        )
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not sliding:
        return {"sliding_window": 0, "sliding_layers": ()}
    window = int(values["sliding_window"])
    if window < 1:
        raise UserError(
            f"config.json: sliding_window {window} is under 1",
            "take the file that came with the weights",
        )
    return {"sliding_window": window, "sliding_layers": sliding}


def _experts(values: Values) -> int:
    name = "num_experts" if "num_experts" in values else "num_local_experts"
    experts, chosen = int(values[name]), int(values["num_experts_per_tok"])
    if not 1 <= chosen <= experts:
        raise UserError(
            f"config.json: num_experts_per_tok {chosen} is not between 1 and {name} {experts}",
            "take the file that came with the weights",
        )
    return experts


#: model_type -> (defaults of its configuration class where ours differ, reader of its options).
_FAMILIES: dict[str, tuple[dict[str, Any], Callable[[Values], dict[str, Any]]]] = {
    "llama": ({"default_rope_theta": 1e4}, _llama),
    "qwen2": ({"default_rope_theta": 1e4}, _qwen2),
    "qwen3": ({"default_rope_theta": 1e4, "head_dim": 128}, _qwen3),
    "qwen3_moe": ({"default_rope_theta": 1e4}, _qwen3_moe),
    "smollm3": ({"default_rope_theta": 2e6, "tie_word_embeddings": True}, _smollm3),
    "gemma3_text": (
        {
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        _gemma3,
    ),
    "gpt_oss": (
        {
            "default_rope_theta": 150_000.0,
            "attention_bias": True,
            "head_dim": 64,
            "num_experts_per_tok": 4,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        _gpt_oss,
    ),
}
