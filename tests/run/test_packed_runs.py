"""Whole runs beside a packed base, with experts and without: killed, resumed, exported."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from student_fixtures import run
from tiny_runs import assert_same_run, finish, report, settings, start
from tiny_student import HIDDEN, LAYERS, VOCAB, write_student

from cosr_jax.config import from_config_dict
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.evaluate import evaluate
from cosr_jax.run.export import export
from cosr_jax.student.peft import import_adapter
from cosr_jax.student.quantised import is_packed
from cosr_jax.student.weights import load_student
from cosr_jax.train.step import init_state

pytestmark = pytest.mark.slow

EXPERTS = 4
KINDS = {
    "plain": {"quantise": "nf4", "quantise_block": 8},
    "experts": {"quantise": "int8", "quantise_block": 16},
}
SECTIONS = {"train": {"max_rounds": 2, "steps_per_round": 2}, "checkpoint": {"every_steps": 1}}


def give_experts(folder):
    """Makes the tiny student of ``folder`` one like Qwen3-MoE; its layers still add nothing."""
    rng = np.random.default_rng(1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": HIDDEN // 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        front = f"model.layers.{layer}"
        for linear in ("gate_proj", "up_proj", "down_proj"):
            value = tensors.pop(f"{front}.mlp.{linear}.weight")
            for expert in range(EXPERTS):
                own = np.roll(value, expert, axis=1)
                tensors[f"{front}.mlp.experts.{expert}.{linear}.weight"] = own
        router = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
        tensors[f"{front}.mlp.gate.weight"] = router
        for norm in ("q_norm", "k_norm"):
            tensors[f"{front}.self_attn.{norm}.weight"] = np.ones(HIDDEN // 2, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(params=KINDS, scope="module")
def finished(request, tmp_path_factory, program_cache):
    """A run that nothing disturbed: its settings, config and workdir."""
    source = write_student(tmp_path_factory.mktemp("source"))
    if request.param == "experts":
        give_experts(source)
    values = settings(source, **SECTIONS)
    values["student"] |= KINDS[request.param]
    workdir = tmp_path_factory.mktemp("packed") / "unbroken"
    finish(start(values, workdir, program_cache))
    return values, from_config_dict(values), workdir


def test_a_killed_run_ends_like_one_that_was_not(finished, program_cache, tmp_path):
    values, _, unbroken = finished
    workdir = tmp_path / "run"
    finish(start(values, workdir, program_cache, "update", 4), -signal.SIGKILL)
    assert not (workdir / "report.json").exists()
    finish(start(values, workdir, program_cache))
    assert_same_run(workdir, unbroken)
    assert report(workdir)["steps"] == 4


def test_the_best_checkpoint_is_measured_again_and_exported(finished, here, tmp_path):
    _, config, workdir = finished
    trained = report(workdir)
    again = evaluate(config, workdir).to_json()
    assert again["steps"] == trained["best"]["step"]
    assert again["probes"]["test"]["after"] == trained["probes"]["test"]["after"]

    student = load_student(config.student, config.lora)
    assert is_packed(student.base)
    with CheckpointStore(workdir / "checkpoints", 1) as store:
        template = jax.eval_shape(lambda lora: init_state(lora, config.train), student.lora)
        lora = store.restore(template, store.latest_step()).arrays.lora
    folder = export(workdir, "peft", "latest", tmp_path / "adapter")
    exported = import_adapter(folder, student, config.lora)
    jax.tree.map(np.testing.assert_array_equal, exported, lora)
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert named["base_model_name_or_path"] == config.student.source  # as it was, not packed

    folder = export(workdir, "merged", "latest", tmp_path / "merged")
    plain = dataclasses.replace(config.student, source=str(folder), quantise="none")
    merged = load_student(plain, config.lora)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 9))
    adapted = run(student, tokens, lora=lora)
    scale = np.abs(adapted).max()
    found = run(merged, tokens, adapters=False)
    np.testing.assert_allclose(found, adapted, rtol=0, atol=1e-5 * scale)
    assert np.abs(run(student, tokens, adapters=False) - adapted).max() > 1e-3 * scale
