"""Odd and old spellings of config.json, live against transformers and PEFT (``-m parity``).

Windows and original contexts are shorter than the sequences, so that every option acts.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from student_fixtures import run, stirred

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.model import KVCache, ModelConfig, merge
from cosr_jax.student.peft import export_adapter, import_adapter
from cosr_jax.student.weights import load_student

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
TOLERANCE = 2e-4  # of the largest logit
TIME, VOCAB = 24, 64
LORA = LoraConfig(rank=2, alpha=4.0, targets=(r"attn\..*",))


def sizes(heads, kv_heads, layers=3, **more):
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16 * heads,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        **more,
    }


VARIANTS = {
    "llama, old form, one key-value head": {
        "model_type": "llama",
        **sizes(3, 1, head_dim=8, attention_bias=True, mlp_bias=True),
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.7},
        "original_max_position_embeddings": 8,
        "torch_dtype": "bfloat16",
    },
    "llama, new form beside an old theta": {
        "model_type": "llama",
        **sizes(2, 2, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
        "rope_theta": 70_000.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "smollm3, sliding where positions are not": {
        "model_type": "smollm3",
        **sizes(4, 2, layers=4, no_rope_layer_interval=2, pad_token_id=0),
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "qwen2, some layers slide": {
        "model_type": "qwen2",
        **sizes(4, 2, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "qwen3, both forms of RoPE": {
        "model_type": "qwen3",
        **sizes(4, 4, head_dim=8, attention_bias=True, rms_norm_eps=1e-2),
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0},
    },
    "qwen3_moe, not normalised, all layers slide": {
        "model_type": "qwen3_moe",
        **sizes(4, 2, layers=4, head_dim=8, moe_intermediate_size=16, hidden_act="silu"),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "gemma3, old form": {
        "model_type": "gemma3_text",
        **sizes(4, 1, layers=4, head_dim=8, sliding_window=3, sliding_window_pattern=2),
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 5.0,
        "attention_bias": True,
        "rope_theta": 1e5,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3, new form, YaRN": {
        "model_type": "gemma3_text",
        **sizes(2, 2, head_dim=8, sliding_window=1, tie_word_embeddings=False),
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt_oss, all by default": {
        "model_type": "gpt_oss",
        **sizes(4, 2, head_dim=64, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    },
    "gpt_oss, no biases, tight limits": {
        "model_type": "gpt_oss",
        **sizes(4, 4, head_dim=8, sliding_window=2, num_local_experts=4, num_experts_per_tok=4),
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "attention_bias": False,
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.0,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 100.0,
    },
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Name -> their model with random weights, ours with adapters, and the folder."""
    cache = {}

    def load(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp("variant")
            model = write_variant(folder, VARIANTS[name])
            student = load_student(StudentConfig(source=str(folder)), LORA)
            cache[name] = model, dataclasses.replace(student, lora=stirred(student.lora)), folder
        return cache[name]

    return load


def write_variant(folder, values):
    """A folder with random weights and just these values as config.json; the model in it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for value in model.parameters():  # predictions far from uniform
            value.normal_(1.0, 0.2) if value.ndim == 1 else value.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    resaved = json.loads((folder / "config.json").read_text())
    assert ModelConfig.from_hf(resaved) == ModelConfig.from_hf(values)
    (folder / "config.json").write_text(json.dumps(values))
    return model.eval()


def theirs(model, rows):
    """float32 logits of each row by itself."""
    import torch

    with torch.no_grad():
        return [model(torch.tensor([list(row)])).logits[0].numpy() for row in rows]


def assert_close(ours, wanted, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_padded_and_packed_rows_equal_transformers(name, loaded):
    model, student, _ = loaded(name)
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.integers(0, VOCAB, size) for size in (20, 20, 13, 9))
    pad = np.full(4, 7)
    tokens = np.stack([np.r_[a, pad], np.r_[pad, b], np.r_[c, d, pad[:2]]])
    segments = np.array([[1] * 20 + [0] * 4, [0] * 4 + [1] * 20, [1] * 13 + [2] * 9 + [0] * 2])
    places = np.stack([np.r_[:TIME], np.r_[[0] * 4, :20], np.r_[:13, :9, 0, 0]])
    logits = run(student, tokens, places, segments, adapters=False)
    ours = logits[0, :20], logits[1, 4:], logits[2, :13], logits[2, 13:22]
    for got, wanted in zip(ours, theirs(model, (a, b, c, d)), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(
    "name", [n for n in VARIANTS if n.startswith(("smollm3", "qwen3,", "gemma3, new", "gpt_oss"))]
)
def test_decoding_token_by_token_equals_transformers(name, loaded):
    model, student, _ = loaded(name)
    row, width = np.random.default_rng(1).integers(0, VOCAB, TIME), 8

    @jax.jit
    def prefill(lora, base, tokens):
        module = merge(student.graphdef, lora, base)
        every = jnp.broadcast_to(jnp.arange(width), (1, width))
        return module.prefill(tokens, every, jnp.ones((1, width), bool), adapters=False)

    @jax.jit
    def decode(lora, base, cache, token, position):
        module = merge(student.graphdef, lora, base)
        hidden, cache = module.decode(token, position, cache, position - width, adapters=False)
        return module.logits(hidden), cache

    k, v = prefill(student.lora, student.base, jnp.asarray(row[None, :width], jnp.int32))
    cache = dataclasses.replace(
        KVCache.empty(student.config, 1, 1, width, TIME - width, jnp.float32, unstacked=False),
        prompt_k=k,
        prompt_v=v,
        prompt_positions=jnp.arange(width)[None],
    )
    logits = []
    for at in range(width, TIME):
        token, position = jnp.asarray(row[at : at + 1], jnp.int32), jnp.array([at], jnp.int32)
        got, cache = decode(student.lora, student.base, cache, token, position)
        logits.append(got[0])
    assert_close(np.stack(logits), theirs(model, [row])[0][width:])


@pytest.mark.parametrize(
    "name", [n for n in VARIANTS if not n.endswith(("theta", "RoPE", "YaRN", "limits"))]
)
def test_adapters_have_peft_s_logits_and_gradients(name, loaded, tmp_path):
    """Attention's; there and back without a changed bit."""
    import peft
    import torch

    model, student, _ = loaded(name)
    export_adapter(student, LORA, tmp_path / "adapter", "tiny")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, TIME))
    inputs = torch.tensor(tokens)
    logits = adapted(inputs).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    loss.backward()
    wanted = {
        key.replace(".default", ""): value.grad.numpy()
        for key, value in adapted.named_parameters()
        if "lora_" in key
    }
    adapted.save_pretrained(tmp_path / "resaved")
    adapted.unload()  # the model is the other tests' as well

    @jax.jit
    @jax.value_and_grad
    def our_loss(lora):
        module = merge(student.graphdef, lora, student.base)
        layout = jnp.broadcast_to(jnp.arange(TIME), (2, TIME)), jnp.ones((2, TIME), jnp.int32)
        ours = module.logits(module(jnp.asarray(tokens, jnp.int32), *layout))
        logprobs = jax.nn.log_softmax(ours[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    value, gradient = our_loss(student.lora)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    assert_close(run(student, tokens), logits.detach().numpy())
    assert np.abs(logits.detach().numpy() - run(student, tokens, adapters=False)).max() > 0.1
    export_adapter(dataclasses.replace(student, lora=gradient), LORA, tmp_path / "gradient", "tiny")
    ours = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    assert ours.keys() == wanted.keys()
    largest = max(np.abs(value).max() for value in wanted.values())
    for key, value in wanted.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-4 * largest)
    again = import_adapter(tmp_path / "resaved", student, LORA)
    for got, value in zip(jax.tree.leaves(again), jax.tree.leaves(student.lora), strict=True):
        np.testing.assert_array_equal(got, value)
