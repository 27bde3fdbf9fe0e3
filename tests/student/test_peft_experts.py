"""Adapters of Qwen3-MoE's experts as PEFT has them beside transformers 5: joined parameters.

Files are made here index by index; tests/student/test_parity.py has those that PEFT makes.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from student_fixtures import stirred, tiny_student

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.model import abstract_student
from cosr_jax.student.peft import export_adapter, import_adapter
from cosr_jax.types import UserError

EXPERTS, HIDDEN, WIDTH, LAYERS = 4, 32, 16, (0, 2)  # layer 1 has a plain MLP
RUN = LoraConfig(rank=4, alpha=8.0, targets=(r"attn\.q_proj", r"moe\..*"))
OUTER = "base_model.model.model.layers.{}.mlp.experts.lora_{}.weight"
INNER = "base_model.model.model.layers.{}.mlp.experts.base_layer.lora_{}.weight"
QUERY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def student(lora=RUN):
    return abstract_student(tiny_student("family_qwen3_moe").config, StudentConfig(), lora)


def write(folder, factors, **settings):
    """An adapter file from {(name, layer): (A [experts, rank, in], B [experts, out, rank])}."""
    tensors = {}
    for (name, layer), (a, b) in factors.items():
        experts, rank, inputs = a.shape
        packed_a = np.zeros((experts * rank, inputs), np.float32)
        packed_b = np.zeros((b.shape[1], rank * experts), np.float32)
        for expert in range(experts):
            for component in range(rank):
                packed_a[expert * rank + component] = a[expert, component]
                packed_b[:, component * experts + expert] = b[expert, :, component]
        tensors[name.format(layer, "A")] = packed_a
        tensors[name.format(layer, "B")] = packed_b
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(joined_rank, rank=4):
    """Dense random factors of every module."""
    rng = np.random.default_rng(0)

    def draw(number, ranks, inputs, outputs):
        shapes = (number, ranks, inputs), (number, outputs, ranks)
        return tuple(rng.normal(0.0, 0.1, shape).astype(np.float32) for shape in shapes)

    made = {(QUERY, layer): draw(1, rank, HIDDEN, HIDDEN) for layer in range(3)}
    for layer in LAYERS:
        made[INNER, layer] = draw(EXPERTS, joined_rank, HIDDEN, 2 * WIDTH)
        made[OUTER, layer] = draw(EXPERTS, rank, WIDTH, HIDDEN)
    return made


def blocks(made):
    """Gate uses the first half of the joined ranks, up the second, as PEFT joins them."""
    for layer in LAYERS:
        _, b = made[INNER, layer]
        half = b.shape[-1] // 2
        b[:, :WIDTH, half:] = 0
        b[:, WIDTH:, :half] = 0
    return made


JOINED = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}


def assert_same_products(state, made, scale, inner_scale=None):
    """scale A B of every linear, in float64, against the file's."""

    def product(linear, row):
        a, b = (
            np.asarray(state["layers"][linear[0]][linear[1]][f].get_raw_value()[row], np.float64)
            for f in ("lora_a", "lora_b")
        )
        return scale * a @ b

    def wanted(name, layer, scale):
        a, b = (value.astype(np.float64) for value in made[name, layer])
        return scale * np.einsum("eor,eri->eio", b, a)

    for row, layer in enumerate(LAYERS):
        joined = wanted(INNER, layer, inner_scale or scale)
        pairs = (
            ("gate_proj", joined[..., :WIDTH]),
            ("up_proj", joined[..., WIDTH:]),
            ("down_proj", wanted(OUTER, layer, scale)),
        )
        for name, value in pairs:
            np.testing.assert_allclose(product(("moe", name), row), value, rtol=0, atol=1e-7)
            assert np.abs(value).max() > 0.01
    for layer in range(3):
        value = wanted(QUERY, layer, scale)[0]
        np.testing.assert_allclose(product(("attn", "q_proj"), layer), value, rtol=0, atol=1e-7)


def test_gate_and_up_of_a_joined_adapter_share_its_a(tmp_path):
    made = factors(joined_rank=4)
    state = import_adapter(write(tmp_path, made), student(), RUN)
    assert_same_products(state, made, scale=2.0)
    moe = state["layers"]["moe"]
    for name in ("gate_proj", "up_proj"):
        a = np.asarray(moe[name]["lora_a"].get_raw_value())
        np.testing.assert_array_equal(a[1], made[INNER, 2][0].transpose(0, 2, 1))


def test_what_peft_joined_comes_apart_bit_by_bit(tmp_path):
    made = blocks(factors(joined_rank=8))
    moe = import_adapter(write(tmp_path, made, **JOINED), student(), RUN)["layers"]["moe"]
    for row, layer in enumerate(LAYERS):
        a, b = made[INNER, layer]
        for number, name in enumerate(("gate_proj", "up_proj")):
            ranks, outputs = np.r_[:4] + 4 * number, np.r_[:WIDTH] + WIDTH * number
            for factor, wanted in (
                ("lora_a", a[:, ranks].transpose(0, 2, 1)),
                ("lora_b", b[:, outputs][..., ranks].transpose(0, 2, 1)),
            ):
                got = np.asarray(moe[name][factor].get_raw_value()[row])
                np.testing.assert_array_equal(got, wanted)


def test_joined_and_trained_since_needs_the_joined_rank(tmp_path):
    made = factors(joined_rank=8)
    folder = write(tmp_path, made, **JOINED)
    says = (
        r"experts\.base_layer\.lora_A.* is of rank 8, more than the run's 4.*rank=8 .*alpha=16\.0"
    )
    with pytest.raises(UserError, match=says):
        import_adapter(folder, student(), RUN)
    run = dataclasses.replace(RUN, rank=8, alpha=16.0)
    state = import_adapter(folder, student(run), run)
    assert_same_products(state, made, scale=2.0)
    # The ranks that others lack can be trained: B is zero there, and A is not.
    down = state["layers"]["moe"]["down_proj"]
    assert np.abs(down["lora_a"].get_raw_value()[..., 4:]).min() > 0
    assert not np.any(down["lora_b"].get_raw_value()[..., 4:, :])


def test_an_odd_joined_rank_and_a_scale_of_its_own(tmp_path):
    made = factors(joined_rank=3)
    folder = write(tmp_path, made, rank_pattern={"experts.gate_up_proj": 3}, use_rslora=True)
    run = dataclasses.replace(RUN, rank_stabilised=True)
    state = import_adapter(folder, student(run), run)
    assert_same_products(state, made, scale=8 / 4**0.5, inner_scale=8 / 3**0.5)


def test_experts_that_the_run_adapts_by_half_are_refused(tmp_path):
    run = dataclasses.replace(RUN, targets=(r"attn\.q_proj", r"moe\.(gate|down)_proj"))
    with pytest.raises(UserError, match=r"config\.lora\.targets: the adapter joins gate_proj and"):
        import_adapter(write(tmp_path, factors(4)), student(run), run)


def test_only_one_parameter_is_not_wrapped_twice(tmp_path):
    made = factors(joined_rank=4)
    kept = {k: v for k, v in made.items() if k[0] != OUTER}
    outer = {(OUTER if k[0] == INNER else k[0], k[1]): v for k, v in kept.items()}
    run = dataclasses.replace(RUN, targets=(r"attn\.q_proj", r"moe\.(gate|up)_proj"))
    state = import_adapter(write(tmp_path, outer), student(run), run)
    got = np.asarray(state["layers"]["moe"]["up_proj"]["lora_b"].get_raw_value()[0])
    np.testing.assert_array_equal(got, made[INNER, 0][1][:, WIDTH:].transpose(0, 2, 1))
    with pytest.raises(UserError, match="fits no adapter of this student"):
        import_adapter(write(tmp_path, made), student(run), run)


def test_an_adapter_of_the_router_is_refused(tmp_path):
    made = factors(joined_rank=4)
    router = QUERY.replace("self_attn.q_proj", "mlp.gate")
    made[router, 0] = made[QUERY, 0]
    with pytest.raises(UserError, match=r"mlp\.gate\.lora_A.*fits no adapter of this student"):
        import_adapter(write(tmp_path, made), student(), RUN)


WRONG = {
    "rank": ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern cannot be 2.5"),
    "alpha": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern cannot be 'x'"),
    "patterns": ({"rank_pattern": [4]}, r"rank_pattern cannot be \[4\]"),
    "expression": ({"rank_pattern": {"(": 4}}, r"rank_pattern '\(' is no regular expression"),
    "usual": ({"r": 0}, "r cannot be 0"),
    "flag": ({"use_rslora": "no"}, "use_rslora cannot be 'no'"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_are_refused(name, tmp_path):
    settings, says = WRONG[name]
    with pytest.raises(UserError, match=f"adapter_config.json: .*{says}"):
        import_adapter(write(tmp_path, {}, **settings), student(), RUN)


def test_rank_stabilised_experts_are_exported_in_a_scale_that_joining_keeps(tmp_path):
    """PEFT doubles rank and alpha when it joins, which would change alpha / sqrt(rank)."""
    run = dataclasses.replace(RUN, rank_stabilised=True)
    fresh = student(run)
    values = jax.tree.map(lambda like: np.zeros(like.shape, np.float32), fresh.lora)
    adapted = dataclasses.replace(fresh, lora=stirred(values))
    export_adapter(adapted, run, tmp_path / "adapter", "tiny")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 16, False)
    again = import_adapter(tmp_path / "adapter", fresh, run)
    jax.tree.map(np.testing.assert_array_equal, again, adapted.lora)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.2.mlp.experts.3.gate_proj.lora_A.weight" in tensors
