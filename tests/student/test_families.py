"""Every family against transformers' figures, in all layouts, decoded, adapted and on a mesh."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from student_fixtures import (
    FAMILIES,
    LORA,
    reference,
    run,
    stirred,
    tiny_config,
    tiny_student,
    tiny_weights,
    write_folder,
)

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig
from cosr_jax.student.model import KVCache, ModelConfig, Student, abstract_student, merge
from cosr_jax.student.mxfp4 import ExpandedFolder, expand
from cosr_jax.student.names import hf_names
from cosr_jax.student.peft import export_adapter, export_merged, import_adapter
from cosr_jax.student.tensor_files import TensorFolder
from cosr_jax.student.weights import hf_tensors, load_base, load_student
from cosr_jax.types import UserError

TOLERANCE = 2e-4  # of the largest logit
#: Gemma 3 and gpt-oss have nearly every option; the others' turn comes with the live comparisons.
OFTEN = [
    name
    if name in ("family_gemma3", "family_gpt_oss")
    else pytest.param(name, marks=pytest.mark.parity)
    for name in FAMILIES
]
MIXED = "family_qwen3_moe"  # the middle one of its three layers has a plain MLP

#: gpt-oss' default in transformers.
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SLIDING = ["full_attention", "sliding_attention", "full_attention"]


def assert_equal_logits(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_and_packed_rows_equal_transformers(name):
    """One batch: padding on the right, on the left, and two sequences packed into a row."""
    values = reference(name)
    prompts, wanted, pad = values["prompts"], values["logits"], np.full(4, 7)
    assert np.abs(wanted).max() > 1  # or the tolerance would mean nothing
    tokens = np.stack(
        [
            np.concatenate([prompts[0], pad]),
            np.concatenate([pad, prompts[1]]),
            np.concatenate([prompts[2, :9], prompts[3, :8], pad[:3]]),
        ]
    )
    segments = np.array([[1] * 16 + [0] * 4, [0] * 4 + [1] * 16, [1] * 9 + [2] * 8 + [0] * 3])
    places = np.stack([np.r_[:20], np.r_[[0] * 4, :16], np.r_[:9, :8, [0] * 3]])
    logits = run(tiny_student(name), tokens, places, segments)
    assert_equal_logits(logits[0, :16], wanted[0])
    assert_equal_logits(logits[1, 4:], wanted[1])
    assert_equal_logits(logits[2, :9], wanted[2, :9])
    assert_equal_logits(logits[2, 9:17], wanted[3, :8])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", OFTEN)
def test_decoding_token_by_token_equals_transformers(name):
    """Prompts of 6 and 4 tokens, two samples of each; sliding windows end inside and after them."""
    values, student, columns = reference(name), tiny_student(name), 8
    prompts, wanted, pads = values["prompts"][:2], values["logits"], np.array([0, 2])
    tokens = np.stack(
        [np.concatenate([[7] * pad, p[: 6 - pad]]) for p, pad in zip(prompts, pads, strict=True)]
    )
    mask = np.arange(6)[None] >= pads[:, None]
    places = np.arange(6)[None] - pads[:, None]

    @jax.jit
    def prefill(lora, base):
        module = merge(student.graphdef, lora, base)
        return module.prefill(
            jnp.asarray(tokens, jnp.int32), jnp.asarray(np.maximum(places, 0)), jnp.asarray(mask)
        )

    @jax.jit
    def decode(lora, base, cache, tokens, positions, column):
        module = merge(student.graphdef, lora, base)
        hidden, cache = module.decode(tokens, positions, cache, column)
        return module.logits(hidden), cache

    k, v = prefill(student.lora, student.base)
    cache = dataclasses.replace(
        KVCache.empty(student.config, 4, 2, 6, columns, jnp.float32, unstacked=False),
        prompt_k=k,
        prompt_v=v,
        prompt_positions=jnp.asarray(np.where(mask, places, -1)),
    )
    rows = np.repeat(np.arange(2), 2)
    for column in range(columns):
        at = 6 - pads[rows] + column
        new = jnp.asarray(prompts[rows, at])
        logits, cache = decode(
            student.lora, student.base, cache, new, jnp.asarray(at), jnp.full(len(at), column)
        )
        assert_equal_logits(logits, wanted[rows, at])


@pytest.mark.parametrize("name", OFTEN)
def test_adapters_come_back_from_peft_s_format_and_merge(name, tmp_path):
    source = write_folder(tmp_path / "source", name)
    student, prompts = tiny_student(name), reference(name)["prompts"]
    adapted = dataclasses.replace(student, lora=stirred(student.lora))
    logits = run(adapted, prompts)
    assert np.abs(logits - run(student, prompts)).max() > 0.1

    export_merged(adapted, LORA, tmp_path / "merged", source)
    merged = dataclasses.replace(student, base=load_base(student, tmp_path / "merged"))
    assert_equal_logits(run(merged, prompts), logits)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written

    if name == MIXED:  # all but the plain MLP, for which PEFT has no name
        lora = dataclasses.replace(LORA, targets=(r"attn\..*", r"moe\..*"))
        adapted = abstract_student(student.config, StudentConfig(), lora)
        kept = {path: v for path, v in stirred(student.lora).flat_state() if "mlp" not in path}
        adapted = dataclasses.replace(adapted, lora=nnx.State.from_flat_path(kept))
    export_adapter(adapted, LORA, tmp_path / "adapter", "tiny")
    again = import_adapter(tmp_path / "adapter", adapted, LORA)
    assert jax.tree.structure(again) == jax.tree.structure(adapted.lora)
    for got, value in zip(jax.tree.leaves(again), jax.tree.leaves(adapted.lora), strict=True):
        np.testing.assert_array_equal(got, value)


def test_peft_has_no_form_for_adapters_of_plain_mlps_beside_experts(tmp_path):
    with pytest.raises(UserError, match=r"config\.lora\.targets: PEFT takes gate_proj"):
        export_adapter(tiny_student(MIXED), LORA, tmp_path / "adapter", "tiny")


def test_peft_has_no_form_for_half_of_what_it_joins(tmp_path):
    student = tiny_student(MIXED)
    lora = dataclasses.replace(LORA, targets=(r"attn\..*", r"moe\.gate_proj"))
    half = abstract_student(student.config, StudentConfig(), lora)
    with pytest.raises(UserError, match=r"config\.lora\.targets: PEFT joins gate_proj and up_proj"):
        export_adapter(half, lora, tmp_path / "adapter", "tiny")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_has_one_name(name):
    student, weights = tiny_student(name), tiny_weights(name)
    assert {path for path, _ in student.base.flat_state()} == set(hf_names(student.config))
    variables = ((path, v.get_raw_value()) for path, v in student.base.flat_state())
    got = dict(hf_tensors(student.config, variables))
    packed = {n.removesuffix("_blocks") for n in weights if n.endswith("_blocks")}
    assert {n.removesuffix("_blocks") for n in weights if not n.endswith("_scales")} == got.keys()
    for tensor in got.keys() - packed:
        np.testing.assert_array_equal(got[tensor], weights[tensor])


@functools.cache
def grown(name, targets=(r".*",), experts=(r".*",)):
    """A tiny student with other adapters, on the host."""
    student = tiny_student(name)
    lora = dataclasses.replace(LORA, targets=targets, experts=experts)
    abstract = abstract_student(student.config, StudentConfig(), lora)
    values = stirred(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.lora))
    return dataclasses.replace(abstract, base=student.base, lora=values)


@pytest.mark.parity  # for its time, as above
@pytest.mark.parametrize("name", [MIXED, "family_gpt_oss"])
def test_experts_spread_over_a_mesh_give_the_same_logits_and_gradients(name):
    student = grown(name)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tokens = jnp.asarray(reference(name)["prompts"])
    layout = jnp.broadcast_to(jnp.arange(16), (4, 16)), jnp.ones((4, 16), jnp.int32)

    def loss(lora, base):
        module = merge(student.graphdef, lora, base)
        logits = module.logits(module(tokens, *layout))
        return (jax.nn.log_softmax(logits)[..., 3]).mean(), logits

    step = jax.value_and_grad(loss, has_aux=True)
    (_, logits), gradients = jax.jit(step)(student.lora, student.base)
    spread = [
        jax.device_put(state, sharding.state_shardings(mesh, state))
        for state in (student.lora, student.base)
    ]
    kernel = spread[1]["layers"]["moe"]["down_proj"]["kernel"].get_raw_value()
    assert kernel.addressable_shards[0].data.shape[1] == 2  # of four experts
    with jax.set_mesh(mesh):
        (_, theirs), others = jax.jit(step)(*spread)
    np.testing.assert_allclose(theirs, logits, atol=1e-4)
    for ours, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        assert np.abs(ours).max() > 0
        np.testing.assert_allclose(other, ours, atol=1e-4 * np.abs(ours).max() + 1e-7)


def test_only_chosen_experts_are_adapted(tmp_path):
    """Two of four experts in layer 0, none in layer 2: as if the others' B were zero."""
    name, experts, attention = MIXED, (r"0\.[13]",), (r"moe\..*",)
    student, prompts = grown(name, attention, experts), reference(name)["prompts"]
    everyone, chosen = grown(name, attention), np.zeros((2, 4), bool)
    chosen[0, [1, 3]] = True  # rows are the layers with experts
    cut = {
        path: v.replace(jnp.where(chosen[:, :, None, None], v.get_raw_value(), 0))
        if path[-1] == "lora_b"
        else v
        for path, v in student.lora.flat_state()
    }
    cut = nnx.State.from_flat_path(cut)
    logits = run(student, prompts)
    np.testing.assert_allclose(run(everyone, prompts, lora=cut), logits, atol=1e-5)
    assert np.abs(run(everyone, prompts) - logits).max() > 0.1

    lora = dataclasses.replace(LORA, targets=attention, experts=experts)
    export_adapter(dataclasses.replace(student, lora=cut), lora, tmp_path / "fits", "tiny")
    import_adapter(tmp_path / "fits", student, lora)
    export_adapter(everyone, lora, tmp_path / "more", "tiny")
    with pytest.raises(UserError, match=r"adapts experts that config\.lora\.experts"):
        import_adapter(tmp_path / "more", student, lora)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (LoraConfig(experts=(r"1\..*",)), "matches no expert"),  # layer 1 has none
        (LoraConfig(dropout=0.1), "does not go with adapters of experts"),
    ],
)
def test_adapters_that_experts_cannot_have_are_refused(lora, says):
    with pytest.raises(UserError, match=says):
        abstract_student(tiny_student(MIXED).config, StudentConfig(), lora)


def test_four_bit_floats_are_expanded_by_the_standard():
    """All sixteen codes, by sign, exponent (bias 1, subnormals) and mantissa; scale 2^(s - 127)."""
    codes = np.arange(16, dtype=np.uint8)
    wanted = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        wanted.append(-size if code & 8 else size)
    blocks = np.tile(codes[::2] | codes[1::2] << 4, 2).reshape(1, 1, 16)
    got = expand(blocks, np.array([[125]], np.uint8))
    np.testing.assert_array_equal(got, [np.tile(wanted, 2) / 4])


def test_parts_of_packed_weights_are_read_alone(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "w_blocks": rng.integers(0, 256, (3, 5, 4, 16), np.uint8),
        "w_scales": rng.integers(120, 130, (3, 5, 4), np.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = ExpandedFolder(TensorFolder(tmp_path))
    assert folder.names == {"w"} and folder.shape("w") == (3, 128, 5)
    whole = folder.read("w")
    np.testing.assert_array_equal(whole, expand(*tensors.values()).swapaxes(1, 2))
    for index in [(slice(1, 3), slice(40, 100), slice(2, 3)), (slice(0, 1), slice(32, 64))]:
        index = (*index, slice(None))[:3]
        np.testing.assert_array_equal(folder.read("w", index), whole[index])
    for damaged, says in (
        ({"w_blocks": tensors["w_blocks"]}, "'w_scales' is missing"),
        ({**tensors, "w_scales": tensors["w_scales"][:, 1:]}, "are not MXFP4"),
    ):
        save_file(damaged, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=says):
            ExpandedFolder(TensorFolder(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ("gemma3", {"sliding_window": 0}, "sliding_window 0 is under 1"),
        ("smollm3", {"no_rope_layers": [1]}, "1 entries for 3 layers"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ("gpt_oss", {"quantization_config": {"bits": 4}}, "quant_method None"),
        ("qwen3", {"num_hidden_layers": 2.5}, "num_hidden_layers 2.5 is no whole number"),
        ("qwen3", {"hidden_size": "32"}, "hidden_size '32' is no whole number"),
        ("qwen3", {"hidden_size": None}, "key 'hidden_size' is missing"),
        ("qwen3", {"head_dim": 7}, "head_dim 7 is odd"),
        ("qwen3", {"rms_norm_eps": "small"}, "rms_norm_eps 'small' is no number"),
        ("qwen3", {"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' is neither"),
        ("qwen3", {"rope_theta": float("inf")}, "rope_theta inf is no number"),
        ("qwen3", {"rope_theta": 0}, "rope_theta 0.0 is not above 0"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("qwen3", {"rope_scaling": "yarn"}, "rope_scaling 'yarn' is no object"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor '4'"),
        ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"rope_parameters": {"full_attention": {}}}, "RoPE of full_attention alone"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types 'full_attention' is no list"),
        ("qwen2", {"use_sliding_window": False, "layer_types": SLIDING}, "no layer slides"),
        ("smollm3", {"sliding_window": 4, "layer_types": SLIDING}, "use_sliding_window None"),
        ("qwen3_moe", {"layer_types": SLIDING}, "layers slide all or none"),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling has the key"),
    ],
)
def test_values_that_are_not_supported_are_named(name, changes, says):
    with pytest.raises(UserError, match=says):
        ModelConfig.from_hf({**tiny_config(f"family_{name}"), **changes})


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        # What config.json leaves out has the default of transformers' class.
        ({}, {"rope_parameters": GPT_OSS_ROPE}),
        ({"rope_theta": 1e4}, {"rope_parameters": {**GPT_OSS_ROPE, "rope_theta": 1e4}}),
        ({"rope_parameters": {}}, {"rope_parameters": {"rope_type": "default"}}),
        # The older key goes first, and the section before what stands beside it.
        (
            {"rope_scaling": GPT_OSS_ROPE, "rope_parameters": {"rope_type": "default"}},
            {"rope_parameters": GPT_OSS_ROPE},
        ),
        (
            {"rope_scaling": {"type": "default", "rope_theta": 7.0}, "rope_theta": 1e4},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        ),
        (
            {"rope_parameters": GPT_OSS_ROPE, "original_max_position_embeddings": 64},
            {"rope_parameters": {**GPT_OSS_ROPE, "original_max_position_embeddings": 64}},
        ),
        (
            {"rope_parameters": {**GPT_OSS_ROPE, "factor": None}, "max_position_embeddings": 8192},
            {"rope_parameters": {**GPT_OSS_ROPE, "factor": 2.0}},
        ),
    ],
)
def test_rope_is_read_as_transformers_reads_it(changes, same_as):
    plain = tiny_config("family_gpt_oss")
    del plain["rope_parameters"]
    got, wanted = (ModelConfig.from_hf({**plain, **more}) for more in (changes, same_as))
    assert got == wanted


def test_yarn_of_gpt_oss_by_its_paper():
    """arXiv:2309.00071, section 3.2: kept above 32 turns, divided below 1, blended between."""
    values = {**tiny_config("family_gpt_oss"), "head_dim": 64}
    values["rope_parameters"] = {
        **values["rope_parameters"],
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
    }
    config = ModelConfig.from_hf(values)
    plain = 150_000.0 ** (-np.arange(0, 64, 2) / 64)
    shares, turns = config.inverse_frequencies() / plain, 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(shares[turns > 32], 1.0, rtol=1e-5)
    np.testing.assert_allclose(shares[turns < 1], 1 / 32, rtol=1e-5)
    between = shares[(turns > 1) & (turns < 32)]
    assert len(between) > 3 and (np.diff(between) < 0).all()
    _, factors, _ = config.rotations()
    np.testing.assert_allclose(factors, 0.1 * np.log(32) + 1, rtol=1e-6)


def test_the_compiled_layer_does_not_grow_with_depth():
    """Twelve sliding, global and unrotated layers are the same program as three."""
    sizes = []
    for layers in (3, 12):
        config = dataclasses.replace(
            tiny_student("family_gemma3").config,
            num_hidden_layers=layers,
            sliding_layers=tuple(range(0, layers, 2)),
            unrotated_layers=(1,),
        )
        student: Student = abstract_student(config, StudentConfig(), LORA)
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

        def forward(lora, base, tokens, graphdef=student.graphdef):
            return merge(graphdef, lora, base)(tokens, tokens, tokens)

        text = jax.jit(forward).lower(student.lora, student.base, tokens).as_text()
        sizes.append(text.count("\n"))
    assert sizes[0] == sizes[1]


def test_a_family_loads_onto_a_mesh_as_onto_one_device(tmp_path):
    folder = write_folder(tmp_path, "family_gpt_oss")
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    spread = load_student(StudentConfig(source=str(folder)), LORA, mesh).base.flat_state()
    alone = tiny_student("family_gpt_oss").base.flat_state()
    for (path, ours), (_, theirs) in zip(spread, alone, strict=True):
        np.testing.assert_array_equal(ours.get_raw_value(), theirs.get_raw_value(), str(path))
