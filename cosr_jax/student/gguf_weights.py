"""GGUF files of the Llama family, turned into a Hugging Face folder.

The metadata's keys and tensor names are those of the GGUF specification
(github.com/ggml-org/ggml, docs/gguf.md); quantised blocks are expanded by the ``gguf`` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from tokenizers import decoders, pre_tokenizers, processors

from cosr_jax.student.model import ModelConfig
from cosr_jax.student.tensor_files import write_tensors
from cosr_jax.types import UserError

_WHOLE_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# The splitting rules that llama.cpp knows by these names (src/llama-vocab.cpp).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes config.json, safetensors and tokenizer files that equal a GGUF file.

    Quantised tensors become float32, all others keep their dtype, so nothing is rounded.

    Args:
      path: a GGUF file of architecture "llama" with a byte-level BPE tokenizer.
      folder: an existing empty folder.

    Raises:
      UserError: the file is missing or broken, or uses something that is not supported.
    """
    try:
        reader = GGUFReader(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "name an existing .gguf file") from error
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{path}: truncated, or no GGUF file ({error})", "get the file again"
        ) from error
    metadata = _Metadata(path, reader)
    config = _hf_config(metadata, reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tensors(folder, _tensors(path, reader, config))
    _write_tokenizer(metadata, folder, config)


class _Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, path: Path, reader: GGUFReader):
        self.path, self._fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise self.unsupported(f"key {key!r} is missing")
        return self.get(key)

    def unsupported(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what}", "use the model's Hugging Face folder, or another student"
        )


def _hf_config(metadata: _Metadata, reader: GGUFReader) -> dict[str, Any]:
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise metadata.unsupported(f"architecture {architecture!r} is not supported")
    if metadata.get("llama.expert_count", 0):
        raise metadata.unsupported("mixtures of experts are not supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise metadata.unsupported(f"llama.rope.scaling.type {scaling!r} is not supported")
    heads = metadata["llama.attention.head_count"]
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    hidden = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise metadata.unsupported(f"{key} {metadata.get(key)} is not the head size {head_dim}")
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise metadata.unsupported("tensor 'token_embd.weight' is missing")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": "float32",
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            config["rope_scaling"] = _rope_scaling(metadata, config, np.asarray(tensor.data))
    return config


def _rope_scaling(
    metadata: _Metadata, config: dict[str, Any], factors: np.ndarray
) -> dict[str, Any]:
    """Llama 3's scaling behind the per-frequency divisors [head_dim / 2] that GGUF stores.

    The file does not hold the parameters themselves.  The releases differ only in the largest
    divisor (8 in 3.1 and 3.3, 32 in 3.2), so that is read off and the rest recomputed and compared.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = ModelConfig.from_hf(config).inverse_frequencies()
    scaled = ModelConfig.from_hf({**config, "rope_scaling": scaling}).inverse_frequencies()
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise metadata.unsupported(f"{_ROPE_FACTORS} are not those of Llama 3")
    return scaling


def _tensors(
    path: Path, reader: GGUFReader, config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue  # went into config.json
        name, kind = _hf_name(path, tensor.name)
        value = _expand(tensor)
        if kind == "attn_q":
            value = unpermute(value, config["num_attention_heads"])
        elif kind == "attn_k":
            value = unpermute(value, config["num_key_value_heads"])
        yield name, value


def _hf_name(path: Path, name: str) -> tuple[str, str]:
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name], name
    parts = name.split(".")  # blk.3.attn_q.weight
    if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight", parts[2]
    raise UserError(
        f"{path}: tensor {name!r} is not one of a Llama decoder", "use a Llama-family student"
    )


def _expand(tensor: gguf.ReaderTensor) -> np.ndarray:
    if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return tensor.data
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * head_dim, in] back in Hugging Face's order.

    GGUF stores the two coordinates that RoPE turns together next to each other (0, d/2, 1, ...);
    Hugging Face, and ``model.rotate``, keep the halves apart (0, 1, ..., d/2, ...).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _pre_tokenizer(metadata: _Metadata) -> Any:
    kind = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("default", "gpt-2"):
        return byte_level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind == "llama-bpe":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise metadata.unsupported(f"tokenizer.ggml.pre {kind!r} is not supported")


def _write_tokenizer(metadata: _Metadata, folder: Path, config: dict[str, Any]) -> None:
    model = metadata["tokenizer.ggml.model"]
    if model != "gpt2":
        raise metadata.unsupported(f"tokenizer.ggml.model {model!r} is not supported")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            # Llama 3's vocabulary holds whole words that its merges do not reach.
            ignore_merges=metadata.get("tokenizer.ggml.pre") == "llama-bpe",
        )
    )
    built.pre_tokenizer = _pre_tokenizer(metadata)
    built.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [t for t, number in zip(tokens, types, strict=True) if number == kind]
        built.add_tokens(
            [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
        )
    named = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            named[f"{name}_token"] = tokens[number]
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = named["bos_token"]
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    built.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **named,
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
