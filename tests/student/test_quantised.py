"""Kernels in eight and four bits: rounding, loading, products and their gradients, and memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from student_fixtures import run, stirred, tiny_config, tiny_weights, write_folder

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig
from cosr_jax.student import weights
from cosr_jax.student.lora import count_parameters, merged_product, merges
from cosr_jax.student.model import ModelConfig, Student, abstract_student
from cosr_jax.student.mxfp4 import FP4_VALUES, expand
from cosr_jax.student.peft import export_merged
from cosr_jax.student.quantised import NF4_VALUES, Quantised, dequantised, quantise
from cosr_jax.student.tensor_files import write_tensors
from cosr_jax.student.weights import load_base, load_student
from cosr_jax.types import UserError

KINDS = ("int8", "nf4")
BLOCK = 8
LORA = LoraConfig(rank=4, alpha=8.0)
widen = jax.jit(lambda packed: packed.astype(jnp.float32))


def levels_of(kernel: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale [blocks, 1, out], and all that a code can mean [blocks, levels, out]."""
    blocks = kernel.reshape(-1, BLOCK, kernel.shape[-1])
    codes = np.arange(-127, 128, dtype=np.float32) if kind == "int8" else NF4_VALUES
    largest = np.abs(blocks).max(1, keepdims=True) / codes[-1]
    scale = largest.astype(ml_dtypes.bfloat16).astype(np.float32)
    return scale, codes[None, :, None] * scale


def assert_nearest(kernel: np.ndarray, kind: str) -> None:
    got = np.asarray(widen(quantise(kernel, kind, BLOCK))).reshape(-1, BLOCK, kernel.shape[-1])
    scale, levels = levels_of(kernel, kind)
    wanted = kernel.reshape(got.shape)
    error = np.abs(got - wanted)
    nearest = np.abs(levels[:, None] - wanted[:, :, None]).min(2)
    assert (np.isclose(got[:, :, None], levels[:, None], rtol=1e-6, atol=0).any(2)).all()
    assert (error <= nearest + 1e-6 * scale).all()
    widest = 0.5 if kind == "int8" else np.diff(NF4_VALUES).max() / 2
    assert (error <= (widest + 1e-6) * scale).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    numbers=hnp.arrays(np.int32, (2 * BLOCK, 3), elements=st.integers(-4096, 4096)),
    exponent=st.integers(-100, 100),
)
def test_every_entry_becomes_its_nearest_level(kind, numbers, exponent):
    assert_nearest(np.ldexp(numbers.astype(np.float32), exponent), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deviation", [1e-15, 0.02, 1e15])
def test_normal_weights_of_any_size_lose_little(kind, deviation):
    kernel = np.random.default_rng(0).normal(0, deviation, (16 * BLOCK, 16)).astype(np.float32)
    assert_nearest(kernel, kind)
    error = np.asarray(widen(quantise(kernel, kind, BLOCK))) - kernel
    lost = np.sqrt(np.mean(error**2)) / deviation
    assert lost < {"int8": 0.005, "nf4": 0.085}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_already_stays_as_it_is(kind):
    kernel = np.random.default_rng(1).normal(size=(16 * BLOCK, 16)).astype(np.float32)
    kernel[:BLOCK] = 0
    packed = quantise(kernel, kind, BLOCK)
    assert packed.shape == kernel.shape and packed.kind == kind
    assert not np.asarray(widen(packed))[:BLOCK].any()
    again = quantise(widen(packed), kind, BLOCK)
    for old, new in zip(jax.tree.leaves(packed), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 200])  # beside the kernel, and merged into it
def test_gradients_of_a_product_are_those_of_the_wide_kernel(kind, tokens):
    rng = np.random.default_rng(5)
    x, kernel, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((tokens, 2 * BLOCK), (2 * BLOCK, 12), (2 * BLOCK, 4), (4, 12))
    )

    @jax.jit
    def gradients(kernel):
        def loss(x, a, b):
            beside = x @ kernel + 2.0 * (x @ a) @ b
            merged = merged_product(x, kernel, a, b, 2.0)
            return jnp.sum(jnp.sin(merged if merges(x, a, b) else beside))

        return jax.grad(loss, (0, 1, 2))(x, a, b)

    packed = quantise(kernel, kind, BLOCK)
    for got, wanted in zip(gradients(packed), gradients(widen(packed)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [32, 8])
@settings(max_examples=20)
@given(
    blocks=hnp.arrays(np.uint8, (3, 2, 16), elements=st.integers(0, 255)),
    scales=hnp.arrays(np.uint8, (3, 2), elements=st.integers(10, 220)),
)
def test_what_is_mxfp4_already_loses_nothing(block, blocks, scales):
    kernel = np.ascontiguousarray(expand(blocks, scales).T)
    packed = quantise(kernel, "mxfp4", block)
    assert packed.kind == "mxfp4" and packed.shape == kernel.shape
    np.testing.assert_array_equal(widen(packed), kernel)


def test_other_weights_become_their_nearest_value_of_mxfp4():
    kernel = np.random.default_rng(6).normal(size=(16 * BLOCK, 16)).astype(np.float32)
    kernel[:BLOCK] = 0
    got = np.asarray(widen(quantise(kernel, "mxfp4", BLOCK))).reshape(16, BLOCK, 16)
    wanted = kernel.reshape(got.shape)
    largest = np.abs(wanted).max(1, keepdims=True)
    scale = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2)
    levels = FP4_VALUES[None, :, None] * scale
    nearest = np.abs(levels[:, None] - wanted[:, :, None]).min(2)
    np.testing.assert_array_equal(np.abs(got - wanted), nearest)
    assert 0 < np.sqrt(np.mean((got - wanted) ** 2)) < 0.13


@functools.cache
def packed_student(name: str, kind: str, folder) -> Student:
    config = StudentConfig(source=str(folder), quantise=kind, quantise_block=BLOCK)
    student = load_student(config, LORA)
    return dataclasses.replace(student, lora=stirred(student.lora))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("packed"), "tiny_llama")


def test_logits_are_near_the_plain_ones_and_those_of_the_widened_student(folder):
    tokens = np.random.default_rng(2).integers(1, 96, (2, 9))
    nf4, int8 = (packed_student("tiny_llama", kind, folder) for kind in ("nf4", "int8"))
    plain = load_student(StudentConfig(source=str(folder)), LORA).base
    logits = {
        name: run(dataclasses.replace(nf4, base=base), tokens)
        for name, base in {
            "plain": plain,
            "nf4": nf4.base,
            "widened": dequantised(nf4.base, jnp.float32),
            "int8": int8.base,
        }.items()
    }
    scale = np.abs(logits["plain"]).max()
    np.testing.assert_allclose(logits["nf4"], logits["widened"], rtol=0, atol=1e-6 * scale)
    for kind, most in (("int8", 0.01), ("nf4", 0.1)):
        assert 0 < np.abs(logits[kind] - logits["plain"]).mean() / scale < most
    assert count_parameters(nf4.base) == count_parameters(plain)


def test_a_mesh_gets_the_same_codes_in_parts(folder, monkeypatch):
    monkeypatch.setattr(weights, "HELD_BYTES", 0)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    student = packed_student("tiny_llama", "nf4", folder)
    config = StudentConfig(source=str(folder), quantise="nf4", quantise_block=4)
    spread = load_base(abstract_student(student.config, config, LORA), folder, mesh)
    alone = load_base(abstract_student(student.config, config, LORA), folder)
    wanted = sharding.state_shardings(mesh, spread)
    for one, parts, where in zip(*map(jax.tree.leaves, (alone, spread, wanted)), strict=True):
        assert parts.sharding.is_equivalent_to(where, parts.ndim)
        np.testing.assert_array_equal(one, parts)
    codes = spread["layers"]["mlp"]["up_proj"]["kernel"].get_raw_value().codes
    assert codes.addressable_shards[0].data.nbytes * 4 == codes.nbytes == 3 * 32 * 56 // 2


def test_blocks_that_do_not_fit_are_refused_with_their_sizes(folder):
    model = ModelConfig.from_hf(tiny_config("tiny_llama"))

    def abstract(block: int) -> Student:
        return abstract_student(model, StudentConfig(quantise="nf4", quantise_block=block), LORA)

    with pytest.raises(UserError, match=r"quantise_block: 16 does not divide the 56 .*down_proj"):
        abstract(16)
    with pytest.raises(UserError, match="quantise_block: 7 is odd"):
        abstract(7)
    with pytest.raises(UserError, match="mxfp4 packs experts, and this student has none"):
        abstract_student(model, StudentConfig(quantise="mxfp4"), LORA)
    experts = ModelConfig.from_hf(tiny_config("family_gpt_oss"))
    with pytest.raises(UserError, match="24 does not divide the 32 values of a group in MXFP4"):
        abstract_student(experts, StudentConfig(quantise="mxfp4", quantise_block=24), LORA)
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(UserError, match=r"\(packed in blocks\) has 4 entries, which 8 shards"):
        load_base(abstract(BLOCK), folder, mesh)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path, "tiny_llama")
    values = tiny_weights("tiny_llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    values[name] = values[name].copy()
    values[name][3, 2] = np.inf
    write_tensors(folder, values.items())
    with pytest.raises(UserError, match=f"'{name}' has entries that are not finite"):
        load_student(StudentConfig(str(folder), quantise="int8", quantise_block=BLOCK), LORA)


def test_merged_weights_are_those_that_the_adapters_were_beside(folder, tmp_path):
    student = packed_student("tiny_llama", "nf4", folder)
    export_merged(student, LORA, tmp_path / "merged", folder)
    merged = load_student(StudentConfig(source=str(tmp_path / "merged")), LORA)
    tokens = np.random.default_rng(3).integers(1, 96, (2, 9))
    np.testing.assert_allclose(run(merged, tokens), run(student, tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["family_qwen3_moe", pytest.param("family_gpt_oss", marks=pytest.mark.slow)]
)
def test_experts_are_packed_too(name, tmp_path):
    student = packed_student(name, "nf4", write_folder(tmp_path, name))
    layer = student.base["layers"]["moe"]
    assert isinstance(layer["down_proj"]["kernel"].get_raw_value(), Quantised)
    assert not isinstance(layer["router"]["kernel"].get_raw_value(), Quantised)
    tokens = np.random.default_rng(4).integers(1, 96, (2, 9))
    widened = dataclasses.replace(student, base=dequantised(student.base, jnp.float32))
    got, wanted = run(student, tokens), run(widened, tokens)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_experts_kept_in_mxfp4_are_those_that_are_expanded_while_read(tmp_path):
    folder = write_folder(tmp_path, "family_gpt_oss")
    packed = load_student(StudentConfig(source=str(folder), quantise="mxfp4"), LORA)
    plain = load_student(StudentConfig(source=str(folder)), LORA).base
    widened = dequantised(packed.base, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, widened, plain)
    kinds = {
        ".".join(path[1:-1]): value.kind
        for path, variable in packed.base.flat_state()
        if isinstance(value := variable.get_raw_value(), Quantised)
    }
    assert kinds == {"moe.gate_up_proj": "mxfp4", "moe.down_proj": "mxfp4"}
    packed = dataclasses.replace(packed, lora=stirred(packed.lora))
    tokens = np.random.default_rng(4).integers(1, 96, (2, 9))
    got, wanted = run(packed, tokens), run(dataclasses.replace(packed, base=plain), tokens)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
