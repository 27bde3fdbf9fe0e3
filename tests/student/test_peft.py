"""PEFT adapters and merged folders: out and in again without a changed bit, misfits by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from student_fixtures import LORA, TINY_NAMES, reference, run, stirred, tiny_student, write_folder

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig
from cosr_jax.student.model import abstract_student
from cosr_jax.student.peft import export_adapter, export_merged, import_adapter
from cosr_jax.student.tensor_files import TensorFolder
from cosr_jax.student.weights import load_base
from cosr_jax.types import UserError

Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def trained(name="tiny_llama"):
    student = tiny_student(name)
    return dataclasses.replace(student, lora=stirred(student.lora))


@pytest.fixture
def exported(tmp_path):
    export_adapter(trained(), LORA, tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"


def test_layout_is_peft_s(exported):
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["task_type"] == "CAUSAL_LM"
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 8, False)
    assert settings["base_model_name_or_path"] == "tiny"
    assert set(settings["target_modules"]) == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    tensors = load_file(exported / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2
    kernel = trained().lora["layers"]["attn"]["q_proj"]["lora_a"].get_raw_value()
    assert tensors[Q_A].shape == (4, 32)  # rank x in
    np.testing.assert_array_equal(tensors[Q_A], np.asarray(kernel[1]).T)
    assert tensors[Q_A.replace("lora_A", "lora_B")].shape == (32, 4)  # out x rank


def test_import_gives_back_every_bit(exported):
    lora = import_adapter(exported, tiny_student(), LORA)
    wanted = trained().lora
    assert jax.tree.structure(lora) == jax.tree.structure(wanted)
    for got, value in zip(jax.tree.leaves(lora), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, value)


def test_import_onto_a_mesh_from_an_abstract_student(exported):
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    abstract = abstract_student(tiny_student().config, StudentConfig(), LORA)
    lora = import_adapter(exported, abstract, LORA, mesh)
    value = lora["layers"]["mlp"]["up_proj"]["lora_a"].get_raw_value()
    assert len(value.sharding.device_set) == 8
    np.testing.assert_array_equal(
        value, trained().lora["layers"]["mlp"]["up_proj"]["lora_a"].get_raw_value()
    )


def edit_settings(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


MISFITS = {
    "rank": (
        edit_settings(r=8),
        r"r 8, lora_alpha 8 and .* the scale 1, which differs from the run's 2",
    ),
    "alpha": (
        edit_settings(lora_alpha=16),
        r"lora_alpha 16 .* 4, which differs .*config\.lora\.alpha=16\.0",
    ),
    "scaling": (edit_settings(use_rslora=True), r"use_rslora True .* 4, which differs"),
    "kind": (edit_settings(peft_type="IA3"), "peft_type 'IA3' differs"),
    "DoRA": (edit_settings(use_dora=True), "use_dora True differs"),
    "biases": (edit_settings(bias="all"), "bias 'all' differs"),
    "ranks by name": (
        edit_settings(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}),
        r"q_proj.* has shape \[4, 32\], expected \[2, 32\]",
    ),
    "no rank": (edit_settings(r="gone"), "key 'r' is missing"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "no such file"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"),
        "truncated, or no safetensors",
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q_A)), f"'{Q_A}' is missing"),
    "extra tensor": (
        edit_tensors(lambda t: t.update({Q_A.replace("1.self", "7.self"): t[Q_A]})),
        "fits no adapter of this student",
    ),
    "shape": (
        edit_tensors(lambda t: t.update({Q_A: np.ones((8, 32), np.float32)})),
        r"has shape \[8, 32\], expected \[4, 32\]",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_adapters_that_do_not_fit_are_refused(name, exported):
    damage, says = MISFITS[name]
    damage(exported)
    with pytest.raises(UserError, match=says) as caught:
        import_adapter(exported, tiny_student(), LORA)
    assert str(exported) in str(caught.value)


def test_an_adapter_for_more_modules_than_the_run_adapts_is_refused(exported):
    few = LoraConfig(rank=4, alpha=8.0, targets=(r"attn\.q_proj",))
    student = abstract_student(tiny_student().config, StudentConfig(), few)
    with pytest.raises(UserError, match="fits no adapter of this student"):
        import_adapter(exported, student, few)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_merged_folder_answers_as_the_adapted_student(name, tmp_path):
    source, student = write_folder(tmp_path / "source", name), trained(name)
    (source / "tokenizer.json").write_text("{}")
    export_merged(student, LORA, tmp_path / "merged", source)
    merged = dataclasses.replace(student, base=load_base(student, tmp_path / "merged"))
    prompts = reference(name)["prompts"]
    adapted = run(student, prompts)
    np.testing.assert_allclose(run(merged, prompts, adapters=False), adapted, atol=2e-4)
    assert np.abs(run(student, prompts, adapters=False) - adapted).max() > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert TensorFolder(tmp_path / "merged").names == TensorFolder(source).names


def test_merging_fresh_adapters_changes_no_bit(tmp_path):
    source = write_folder(tmp_path / "source", "tiny_llama")
    export_merged(tiny_student(), LORA, tmp_path / "merged", source)
    ours, theirs = TensorFolder(tmp_path / "merged"), TensorFolder(source)
    for name in theirs.names:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


def test_a_bfloat16_student_merges_into_bfloat16(tmp_path):
    source, student = write_folder(tmp_path / "source", "tiny_llama"), trained()
    half = abstract_student(student.config, StudentConfig(param_dtype="bfloat16"), LORA)
    half = dataclasses.replace(half, base=load_base(half, source), lora=student.lora)
    export_merged(half, LORA, tmp_path / "merged", source)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    got = TensorFolder(tmp_path / "merged").read(name)
    module, adapters = (s["layers"]["mlp"]["up_proj"] for s in (half.base, half.lora))
    a, b = (np.asarray(adapters[k].get_raw_value()[0], np.float64) for k in ("lora_a", "lora_b"))
    exact = np.asarray(module["kernel"].get_raw_value()[0], np.float64) + 2.0 * a @ b
    assert got.dtype == "bfloat16"
    # One rounding: no further from the exact sum than half a unit in the eighth bit.
    error = np.abs(got.astype(np.float64) - exact.T)
    assert (error <= np.abs(exact.T) * 2.0**-8 * 1.001 + 1e-6).all() and error.max() > 0


def test_folders_in_use_are_left_alone(exported):
    before = (exported / "adapter_config.json").read_text()
    with pytest.raises(UserError, match="already exists"):
        export_adapter(trained(), LORA, exported, "other")
    assert (exported / "adapter_config.json").read_text() == before
    export_adapter(trained(), LORA, exported, "other", replace=True)
    assert '"other"' in (exported / "adapter_config.json").read_text()
