"""Published config.json files: read whole, with the number of parameters that their cards state."""

import pytest

from cosr_jax.config import StudentConfig
from cosr_jax.student.lora import count_parameters
from cosr_jax.student.model import ModelConfig, abstract_student
from cosr_jax.student.text_part import alone
from cosr_jax.types import UserError


def sizes(hidden, inner, layers, heads, kv_heads, vocab, **more):
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


LLAMA3 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 131_072,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "use_sliding_window": False,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10_000,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "sliding_window": 512,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "max_position_embeddings": 131_072,
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150_000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
#: Name -> what its config.json says, number of parameters.
PUBLISHED = {
    "Llama-3.2-1B": (
        LLAMA3 | TIED | sizes(2048, 8192, 16, 32, 8, 128_256, head_dim=64),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        LLAMA3 | TIED | sizes(3072, 8192, 28, 24, 8, 128_256, head_dim=128),
        3_212_749_824,
    ),
    "Llama-3.1-8B": (LLAMA3 | UNTIED | sizes(4096, 14_336, 32, 32, 8, 128_256), 8_030_261_248),
    "SmolLM2-135M": (SMOLLM2 | sizes(576, 1536, 30, 9, 3, 49_152), 134_515_008),
    "SmolLM2-360M": (SMOLLM2 | sizes(960, 2560, 32, 15, 5, 49_152), 361_821_120),
    "SmolLM2-1.7B": (SMOLLM2 | sizes(2048, 8192, 24, 32, 32, 49_152), 1_711_376_384),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3",
            "layer_types": ["full_attention"] * 36,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 5_000_000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        }
        | sizes(2048, 11_008, 36, 16, 4, 128_256),
        3_075_098_624,
    ),
    "Qwen2.5-0.5B": (QWEN2 | TIED | sizes(896, 4864, 24, 14, 2, 151_936), 494_032_768),
    "Qwen2.5-1.5B": (QWEN2 | TIED | sizes(1536, 8960, 28, 12, 2, 151_936), 1_543_714_304),
    "Qwen2.5-7B": (QWEN2 | UNTIED | sizes(3584, 18_944, 28, 28, 4, 152_064), 7_615_616_512),
    "Qwen3-0.6B": (QWEN3 | TIED | sizes(1024, 3072, 28, 16, 8, 151_936), 596_049_920),
    "Qwen3-4B": (QWEN3 | TIED | sizes(2560, 9728, 36, 32, 8, 151_936), 4_022_468_096),
    "Qwen3-8B": (QWEN3 | UNTIED | sizes(4096, 12_288, 36, 32, 8, 151_936), 8_190_735_360),
    "Qwen3-30B-A3B": (
        QWEN3
        | UNTIED
        | {
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        }
        | sizes(2048, 6144, 48, 32, 4, 151_936),
        30_532_122_624,
    ),
    "gemma-3-270m": (GEMMA3 | sizes(640, 2048, 18, 4, 1, 262_144), 268_098_176),
    "gemma-3-1b": (
        GEMMA3 | {"sliding_window_pattern": 6} | sizes(1152, 6912, 26, 4, 1, 262_144),
        999_885_952,
    ),
    "gpt-oss-20b": (
        GPT_OSS
        | {"layer_types": ["sliding_attention", "full_attention"] * 12}
        | sizes(2880, 2880, 24, 64, 8, 201_088),
        20_914_757_184,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_has_the_size_of_its_card(name):
    values, parameters = PUBLISHED[name]
    student = abstract_student(ModelConfig.from_hf(values), StudentConfig(), None)
    assert count_parameters(student.base) == parameters


def test_the_text_model_of_gemma_3_4b():
    """Its config.json names what differs from the classes' defaults alone."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = ModelConfig.from_hf(alone({"model_type": "gemma3", "text_config": text}))
    assert config.sliding_layers == tuple(i for i in range(34) if i % 6 != 5)
    student = abstract_student(config, StudentConfig(), None)
    # 4,300,079,472 in all, of which 416,866,032 are the vision tower's and 2,950,272 the
    # projector's.
    assert count_parameters(student.base) == 3_880_263_168


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": name}, f"model_type '{name}' is not supported")
        for name in (
            *("mistral", "mixtral", "phi3", "gemma2", "gemma3n", "gemma3n_text", "llama4"),
            *("llama4_text", "qwen2_moe", "qwen2_5_vl", "qwen3_next", "deepseek_v3", "granite"),
        )
    ]
    + [
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope'"),
    ],
)
def test_students_that_are_nearly_of_a_family_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        ModelConfig.from_hf({**PUBLISHED["Qwen2.5-7B"][0], **changes})
