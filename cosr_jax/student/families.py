"""What each family's config.json says beyond the common keys, as options of ``ModelConfig``.

Keys and defaults are those of transformers' configuration classes; a value that would change the
computation in a way that is not supported is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from cosr_jax.student.keys import REMEDY, Values, flag, listed, number, positive, section, whole
from cosr_jax.student.rope import read_scaling
from cosr_jax.types import UserError

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
    if not isinstance(family, str) or family not in _FAMILIES:
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
    key = "hidden_activation" if values["model_type"] == "gemma3_text" else "hidden_act"
    activation = values.get(key) or "silu"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: {key} {activation!r} is not supported",
            f"use a student with one of {', '.join(ACTIVATIONS)}",
        )
    packing = section(values, "quantization_config")
    method = packing.get("quant_method")
    if packing and method != "mxfp4":
        raise UserError(
            f"config.json: quantization_config of quant_method {method!r} is not supported",
            "use the weights that were not quantised, or MXFP4",
        )
    if number(values, "partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor {values['partial_rotary_factor']} is not "
            "supported",
            "use a student whose heads are rotated whole",
        )
    return {"activation": activation, **_FAMILIES[values["model_type"]][1](values)}


def _llama(values: Values) -> dict[str, Any]:
    return {
        **_attention_bias(values),
        "mlp_bias": flag(values, "mlp_bias"),
        **_plain_rope(values),
    }


def _attention_bias(values: Values) -> dict[str, bool]:
    bias = flag(values, "attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def _qwen2(values: Values) -> dict[str, Any]:
    first = whole(values, "max_window_layers", 28, low=0)
    kinds = [_kind(layer >= first) for layer in _layers(values)]
    return {"qkv_bias": True, **_plain_rope(values), **_optional_window(values, kinds)}


def _qwen3(values: Values) -> dict[str, Any]:
    return {**_qwen2(values), **_attention_bias(values), "qk_norm": True}


def _qwen3_moe(values: Values) -> dict[str, Any]:
    layers = _layers(values)
    plain = listed(values, "mlp_only_layers") or ()
    step = whole(values, "decoder_sparse_step", 1)
    dense = tuple(i for i in layers if i in plain or (i + 1) % step)
    moe = MoeConfig(
        num_experts=_experts(values),
        experts_per_token=whole(values, "num_experts_per_tok"),
        intermediate_size=whole(values, "moe_intermediate_size"),
        normalised=flag(values, "norm_topk_prob"),
        dense_layers=dense,
    )
    kinds = [_kind(flag(values, "use_sliding_window"))] * len(layers)
    if (listed(values, "layer_types") or kinds) != kinds:
        raise UserError(
            f"config.json: layer_types other than {kinds[0]!r} are not supported for qwen3_moe, "
            "whose layers slide all or none, by use_sliding_window",
            "use a student whose layers are all alike",
        )
    return {
        **_attention_bias(values),
        "qk_norm": True,
        **_plain_rope(values),
        **_optional_window(values, kinds),
        "moe": None if len(dense) == len(layers) else moe,
    }


def _smollm3(values: Values) -> dict[str, Any]:
    layers = _layers(values)
    turned = listed(values, "no_rope_layers")  # despite its name: 1 where positions are rotated
    if turned is None:
        interval = whole(values, "no_rope_layer_interval", 4)
        turned = [(layer + 1) % interval != 0 for layer in layers]
    if len(turned) < len(layers):
        raise UserError(
            f"config.json: no_rope_layers has {len(turned)} entries for {len(layers)} layers",
            REMEDY,
        )
    kinds = [_kind(not turned[layer]) for layer in layers]
    return {
        **_llama(values),
        **_optional_window(values, kinds),
        "unrotated_layers": tuple(layer for layer in layers if not turned[layer]),
    }


def _gemma3(values: Values) -> dict[str, Any]:
    if flag(values, "use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention true is not supported", "use a causal student"
        )
    sections, scaling = section(values, "rope_parameters"), section(values, "rope_scaling")
    if "type" in scaling and "rope_type" not in scaling:
        raise UserError(
            "config.json: rope_scaling has the key 'type', which transformers passes over in "
            "Gemma 3",
            "rename it to 'rope_type', if this scaling is meant",
        )
    # transformers does not find "truncate" in the section of a kind of layers.
    far = {**section(sections, "full_attention"), **scaling, "truncate": True}
    near = section(sections, "sliding_attention")
    if read_scaling(near, values) is not None:
        raise UserError(
            "config.json: rope_type of sliding_attention other than 'default' is not supported",
            "use a student whose sliding layers have plain RoPE",
        )
    pattern = whole(values, "sliding_window_pattern", 6)
    # attn_logit_softcapping is left out: transformers' Gemma 3 does not apply it either.
    return {
        **_attention_bias(values),
        "qk_norm": True,
        "rope_theta": positive(far, "rope_theta", positive(values, "rope_theta", 1e6)),
        "rope_scaling": read_scaling(far, values),
        "sliding_rope_theta": positive(
            near, "rope_theta", positive(values, "rope_local_base_freq", 1e4)
        ),
        **_window(values, [_kind((i + 1) % pattern != 0) for i in _layers(values)]),
        "query_scalar": positive(values, "query_pre_attn_scalar"),
        "logit_softcap": number(values, "final_logit_softcapping", 0.0),
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": whole(values, "hidden_size") ** 0.5,
    }


def _gpt_oss(values: Values) -> dict[str, Any]:
    if values.get("rope_parameters") is None and not values.get("rope_scaling"):
        values = {**values, "rope_parameters": _GPT_OSS_ROPE}
    moe = MoeConfig(
        num_experts=_experts(values),
        experts_per_token=whole(values, "num_experts_per_tok"),
        intermediate_size=whole(values, "intermediate_size"),
        normalised=True,
        clamped=True,
        swiglu_limit=number(values, "swiglu_limit"),
        swiglu_alpha=number(values, "swiglu_alpha"),
    )
    return {
        **_attention_bias(values),
        "attention_sinks": True,
        **_plain_rope(values),
        **_window(values, [_kind(i % 2 == 0) for i in _layers(values)]),
        "moe": moe,
    }


def _plain_rope(values: Values) -> dict[str, Any]:
    """RoPE that all layers share; ``rope_scaling``, the older key, wins where both are."""
    rope = section(values, "rope_scaling") or section(values, "rope_parameters")
    for kind in ("full_attention", "sliding_attention"):
        if kind in rope:
            raise UserError(
                f"config.json: RoPE of {kind} alone is not supported in {values['model_type']}",
                "use a student whose layers share one RoPE",
            )
    default = positive(values, "rope_theta", values["default_rope_theta"])
    # Beside the section the original context goes before the one in it, as in transformers.
    original = "original_max_position_embeddings"
    if values.get(original) is not None:
        rope = {**rope, original: values[original]}
    return {
        "rope_theta": positive(rope, "rope_theta", default),
        "rope_scaling": read_scaling(rope, values),
    }


def _layers(values: Values) -> range:
    return range(whole(values, "num_hidden_layers"))


def _kind(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def _optional_window(values: Values, kinds: Sequence[str]) -> dict[str, Any]:
    """The sliding layers of a family that has them only where use_sliding_window is set."""
    if flag(values, "use_sliding_window") and values.get("sliding_window") is not None:
        return _window(values, kinds)
    if "sliding_attention" in (listed(values, "layer_types") or ()):
        raise UserError(
            "config.json: layer_types has sliding_attention, but use_sliding_window "
            f"{values.get('use_sliding_window')} or sliding_window "
            f"{values.get('sliding_window')} says that no layer slides",
            REMEDY,
        )
    return {"sliding_window": 0, "sliding_layers": ()}


def _window(values: Values, kinds: Sequence[str]) -> dict[str, Any]:
    """Which layers see only the last tokens; ``kinds`` where layer_types does not say."""
    kinds = listed(values, "layer_types") or kinds
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"config.json: layer_types {kind!r} is not supported",
                "use a student of full_attention and sliding_attention layers",
            )
    if len(kinds) != len(_layers(values)):
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries for {len(_layers(values))} layers",
            REMEDY,
        )
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not sliding:
        return {"sliding_window": 0, "sliding_layers": ()}
    return {"sliding_window": whole(values, "sliding_window"), "sliding_layers": sliding}


def _experts(values: Values) -> int:
    name = "num_experts" if "num_experts" in values else "num_local_experts"
    experts, chosen = whole(values, name), whole(values, "num_experts_per_tok")
    if chosen > experts:
        raise UserError(
            f"config.json: num_experts_per_tok {chosen} is not between 1 and {name} {experts}",
            REMEDY,
        )
    return experts


#: Of a gpt-oss whose config.json has no RoPE section.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

_QWEN = {
    "default_rope_theta": 1e4,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}

#: model_type -> (defaults of its configuration class where ours differ, reader of its options).
_FAMILIES: dict[str, tuple[dict[str, Any], Callable[[Values], dict[str, Any]]]] = {
    "llama": ({"default_rope_theta": 1e4, "max_position_embeddings": 2048}, _llama),
    "qwen2": (_QWEN, _qwen2),
    "qwen3": ({**_QWEN, "head_dim": 128}, _qwen3),
    "qwen3_moe": ({**_QWEN, "num_key_value_heads": 4, "num_experts_per_tok": 8}, _qwen3_moe),
    "smollm3": (
        {
            "default_rope_theta": 2e6,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        _smollm3,
    ),
    "gemma3_text": (
        {
            "max_position_embeddings": 131_072,
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
            "max_position_embeddings": 131_072,
            "attention_bias": True,
            "num_key_value_heads": 8,
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
