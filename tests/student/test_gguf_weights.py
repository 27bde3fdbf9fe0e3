"""GGUF files: the same student as the Hugging Face folder that they were made from."""

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_fixtures import TOKENS, gguf_name, write_gguf
from student_fixtures import (
    LORA,
    TINY_NAMES,
    reference,
    run,
    tiny_config,
    tiny_student,
    tiny_weights,
)

from cosr_jax.config import StudentConfig
from cosr_jax.student.gguf_weights import convert_gguf
from cosr_jax.student.model import ModelConfig
from cosr_jax.student.tensor_files import TensorFolder, read_json
from cosr_jax.student.weights import load_student
from cosr_jax.types import UserError

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "converted"
    target.mkdir()
    return target


def test_the_whole_way_from_a_gguf_file_to_logits(tmp_path, monkeypatch):
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf")
    student = load_student(StudentConfig(source=str(path)), LORA)
    for ours, wanted in zip(
        jax.tree.leaves(student.base), jax.tree.leaves(tiny_student().base), strict=True
    ):
        np.testing.assert_array_equal(ours, wanted)
    values = reference("tiny_llama")
    np.testing.assert_allclose(run(student, values["prompts"]), values["logits"], atol=2e-4)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tensors_and_config_survive(name, tmp_path, folder):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", name), folder)
    tensors, wanted = TensorFolder(folder), tiny_weights(name)
    assert tensors.names == wanted.keys()
    for tensor, value in wanted.items():
        np.testing.assert_array_equal(tensors.read(tensor), value)
    plain = {**tiny_config(name), "rope_scaling": None}
    got = ModelConfig.from_hf(read_json(folder / "config.json"))
    assert got == ModelConfig.from_hf(
        {**plain, "rms_norm_eps": float(np.float32(plain["rms_norm_eps"]))}
    )


def llama3_factors(factor: float) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3.1 (8) or 3.2 (32)."""
    frequencies = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < 8192 / 4, 1, np.where(wavelengths > 8192, factor, between))
    return factors.astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_llama3_scaling(factor, tmp_path, folder):
    extra = {"rope_freqs.weight": llama3_factors(factor)}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", "tiny_llama3", extra=extra), folder)
    scaling = read_json(folder / "config.json")["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_rope_factors_are_refused(tmp_path, folder):
    factors = llama3_factors(8.0)
    factors[3] = 2.0
    extra = {"rope_freqs.weight": factors}
    with pytest.raises(UserError, match=r"rope_freqs\.weight are not those of Llama 3"):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", "tiny_llama3", extra=extra), folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_stored_types_are_expanded_without_further_rounding(kind, tmp_path, folder):
    stored = GGMLQuantizationType[kind]
    weights = tiny_weights("tiny_llama")
    types = {gguf_name(Q_PROJ): stored}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", types=types), folder)
    got = TensorFolder(folder).read(Q_PROJ).astype(np.float32)
    # Blocks run along rows, so permuting rows and quantising commute.
    wanted = quants.dequantize(quants.quantize(weights[Q_PROJ], stored), stored)
    np.testing.assert_array_equal(got, wanted)
    exact = kind == "F16"  # the references hold float16 values
    assert np.array_equal(got, weights[Q_PROJ]) == exact
    np.testing.assert_allclose(got, weights[Q_PROJ], atol=0.15)
    np.testing.assert_array_equal(TensorFolder(folder).read(DOWN), weights[DOWN])


def encode(folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [TOKENS[i] for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["hel", "l", "o", "Ġ+", "1", "2"]),  # digits one by one
        ("llama-bpe", ["hel", "l", "o", "Ġ+", "12"]),
        ("gpt-2", ["hel", "l", "o", "Ġ+", "12"]),
    ],
)
def test_tokenizer_splits_as_the_metadata_says(pre, pieces, tmp_path, folder):
    convert_gguf(write_gguf(tmp_path / "t.gguf", metadata={"tokenizer.ggml.pre": pre}), folder)
    assert encode(folder, "hello +12") == pieces
    assert encode(folder, "<|im_start|>he<|im_end|>") == ["<|im_start|>", "he", "<|im_end|>"]


def test_bos_is_added_where_the_metadata_says_so(tmp_path, folder):
    from transformers import AutoTokenizer

    metadata = {"tokenizer.ggml.add_bos_token": True}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=metadata), folder)
    assert AutoTokenizer.from_pretrained(folder).encode("he")[0] == 1
    assert encode(folder, "he") == ["he"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count 4"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama'"),
    ],
)
def test_what_is_not_supported_is_named(changes, says, tmp_path, folder):
    path = write_gguf(tmp_path / "tiny.gguf", metadata=changes)
    with pytest.raises(UserError, match=says) as caught:
        convert_gguf(path, folder)
    assert str(path) in str(caught.value)


def test_foreign_tensors_are_named(tmp_path, folder):
    path = write_gguf(tmp_path / "tiny.gguf", extra={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(UserError, match=r"'blk\.0\.attn_q\.bias' is not one of a Llama"):
        convert_gguf(path, folder)


@pytest.mark.parametrize("kept", [0, 3, 40, 3000, 0.5, 0.99])
def test_truncated_files_are_named(kept, tmp_path, folder):
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="truncated, or no GGUF file") as caught:
        convert_gguf(path, folder)
    assert str(path) in str(caught.value)
