"""The text model inside a multimodal checkpoint, and how reading is reported."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from student_fixtures import (
    LORA,
    run,
    stirred,
    tiny_config,
    tiny_student,
    tiny_weights,
    write_folder,
)

from cosr_jax.config import StudentConfig
from cosr_jax.student import text_part
from cosr_jax.student.peft import export_adapter, export_merged, import_adapter
from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.text_part import alone
from cosr_jax.student.weights import load_config, load_student
from cosr_jax.types import UserError

NAME = "family_gemma3"
VISION = ("vision_tower.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight")


def wrapped(folder, prefix="language_model.model.", others=VISION):
    """The tiny Gemma 3 as transformers saves it inside ``Gemma3ForConditionalGeneration``."""
    folder.mkdir()
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": {"hidden_size": 16, "model_type": "siglip_vision_model"},
        "text_config": tiny_config(NAME),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        prefix + name.removeprefix("model."): value for name, value in tiny_weights(NAME).items()
    }
    front = "model." if prefix.startswith("model.") else ""
    tensors |= {front + name: np.ones(3, np.float32) for name in others}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_wrapper_is_the_text_model(prefix, tmp_path, caplog):
    folder = wrapped(tmp_path / "wrapped", prefix)
    assert load_config(str(folder)) == ModelConfig.from_hf(tiny_config(NAME))
    inside = load_student(StudentConfig(source=str(folder)), LORA)
    jax.tree.map(np.testing.assert_array_equal, inside.base, tiny_student(NAME).base)
    assert "2 tensors of other parts than the text model are passed over" in caplog.text


def test_other_tensors_of_a_wrapper_are_named(tmp_path):
    folder = wrapped(tmp_path / "wrapped", others=("audio_tower.norm.weight",))
    with pytest.raises(UserError, match=r"'audio_tower\.norm\.weight' is not one of this arch"):
        load_student(StudentConfig(source=str(folder)), LORA)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "no object text_config"), ({"model_type": "gemma2"}, "'gemma2' is not supported")],
)
def test_a_wrapper_around_something_else_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        alone({"model_type": "gemma3", "text_config": text})


def test_a_merged_export_is_the_text_model_alone(tmp_path):
    source = wrapped(tmp_path / "wrapped")
    student = load_student(StudentConfig(source=str(source)), LORA)
    export_merged(student, LORA, tmp_path / "merged", source)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert load_file(tmp_path / "merged/model.safetensors").keys() == tiny_weights(NAME).keys()


def test_reading_is_told_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "plain", NAME)
    now, told = [0.0], []

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(text_part.time, "monotonic", tick)
    load_student(StudentConfig(source=str(folder)), LORA, tell=told.append)
    number = len(tiny_weights(NAME))
    whole = sum(value.nbytes for value in tiny_weights(NAME).values()) / 2**30
    assert told[-1] == (
        f"read {number} of {number} tensors of the student, {whole:.2f} of {whole:.2f} GiB"
    )
    assert told[0].startswith("read 3 of ")  # a second passes between two tensors
    assert len(told) == pytest.approx(number / 3, abs=1.5)


def test_adapters_inside_a_wrapper_come_back_whole(tmp_path):
    student = dataclasses.replace(tiny_student(NAME), lora=stirred(tiny_student(NAME).lora))
    export_adapter(student, LORA, tmp_path / "adapter", "tiny", wrapped=True)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert all(n.startswith("base_model.model.model.language_model.layers.") for n in names)
    pattern = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    modules = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in names}
    assert len(modules) == 7 * tiny_config(NAME)["num_hidden_layers"]
    assert all(re.fullmatch(pattern, module) for module in modules)
    vision = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    assert not re.fullmatch(pattern, vision)
    again = import_adapter(tmp_path / "adapter", student, LORA)
    jax.tree.map(np.testing.assert_array_equal, again, student.lora)


@pytest.fixture
def wrapper(tmp_path):
    """Gemma 3 with eyes, random and tiny, as transformers saves it."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    # The released models have no soft cap; transformers' wrapper would leave it out, and its text
    # model alone would not.
    text = {**tiny_config(NAME), "final_logit_softcapping": None}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "wrapper")
    return tmp_path / "wrapper"


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks it
def test_a_wrapper_that_transformers_saved_has_its_logits_also_with_adapters_in_peft(
    wrapper, tmp_path
):
    import peft
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration.from_pretrained(wrapper).eval()
    tokens = np.random.default_rng(0).integers(3, tiny_config(NAME)["vocab_size"], (2, 9))
    student = load_student(StudentConfig(source=str(wrapper)), LORA)
    plain = logits(model, tokens)
    scale = np.abs(plain).max()
    assert np.abs(run(student, tokens) - plain).max() <= 2e-4 * scale

    student = dataclasses.replace(student, lora=stirred(student.lora))
    export_adapter(student, LORA, tmp_path / "adapter", str(wrapper), wrapped=True)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    adapted = logits(model, tokens)
    assert np.abs(adapted - plain).max() > 0.1 * scale
    assert np.abs(run(student, tokens) - adapted).max() <= 2e-4 * scale
    # What PEFT saves, with its own names for what was adapted, is read again.
    model.save_pretrained(tmp_path / "again")
    again = import_adapter(tmp_path / "again", student, LORA)
    jax.tree.map(np.testing.assert_array_equal, again, student.lora)
