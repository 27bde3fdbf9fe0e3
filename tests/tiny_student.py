"""A student of two layers that writes boxed ones and twos, as a Hugging Face folder on disk.

Its weights are written down, not trained: the layers add nothing, so the next character depends on
the last one alone.  Half of its answers begin a box, half of them close it, and the value is a coin
toss between 1 and 2.  The suite's counting/1 asks for just these two values, so groups of samples
are mixed from the start, a part of the answers lacks the form, and adapters can improve on both.
"""

import json
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models

HIDDEN, LAYERS, HEADS, MLP = 32, 2, 2, 32
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHARACTERS = (*string.printable[:95], "\n")
VOCAB = 104  # a few more than there are, as mesh axes have to divide it

#: Last token -> next token -> probability; after all others the answer ends.
NEXT = {
    "<|assistant|>": {"\\": 0.5, "1": 0.25, "2": 0.25},
    "\\": {"b": 1.0},
    "b": {"o": 1.0},
    "o": {"x": 1.0},
    "x": {"e": 1.0},
    "e": {"d": 1.0},
    "d": {"{": 1.0},
    "{": {"1": 0.5, "2": 0.5},
    "1": {"}": 0.5, "<|end|>": 0.5},
    "2": {"}": 0.5, "<|end|>": 0.5},
    "}": {"<|end|>": 1.0},
}
#: Always writes a boxed 9, which counting/1 never asks for: the form is right and the value wrong.
WRONG = {
    **{token: NEXT[token] for token in "\\boxe"},
    "<|assistant|>": {"\\": 1.0},
    "d": {"{": 1.0},
    "{": {"9": 1.0},
    "9": {"}": 1.0},
}

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_student(folder: Path, transitions: dict[str, dict[str, float]] = NEXT) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_weights(ids, transitions), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, ids)
    return folder


def _weights(
    ids: dict[str, int], transitions: dict[str, dict[str, float]]
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Tokens of the table have an axis each, on which the output layer reads the next token's odds.
    embed = np.zeros((VOCAB, HIDDEN))
    axes = {token: axis for axis, token in enumerate((*transitions, "<|end|>"))}
    free = HIDDEN - len(axes)
    embed[:, len(axes) :] = rng.normal(size=(VOCAB, free))
    head = np.zeros((VOCAB, HIDDEN))
    for token, axis in axes.items():
        embed[ids[token]] = np.eye(HIDDEN)[axis] * np.sqrt(HIDDEN)
        odds = np.full(VOCAB, -12.0)
        for following, probability in transitions.get(token, {"<|end|>": 1.0}).items():
            odds[ids[following]] = np.log(probability)
        head[:, axis] = odds / np.sqrt(HIDDEN)
    weights = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    weights["model.norm.weight"] = np.ones(HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = np.ones(HIDDEN)
        weights[f"{name}.post_attention_layernorm.weight"] = np.ones(HIDDEN)
        for linear in ("q_proj", "k_proj", "v_proj"):
            weights[f"{name}.self_attn.{linear}.weight"] = _random(rng, HIDDEN, HIDDEN)
        weights[f"{name}.self_attn.o_proj.weight"] = np.zeros((HIDDEN, HIDDEN))
        weights[f"{name}.mlp.gate_proj.weight"] = _random(rng, MLP, HIDDEN)
        weights[f"{name}.mlp.up_proj.weight"] = _random(rng, MLP, HIDDEN)
        weights[f"{name}.mlp.down_proj.weight"] = np.zeros((HIDDEN, MLP))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _random(rng: np.random.Generator, out: int, inner: int) -> np.ndarray:
    return rng.normal(size=(out, inner)) / np.sqrt(inner)


def _write_tokenizer(folder: Path, ids: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))  # no merges: one token a character
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
