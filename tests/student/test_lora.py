"""Adapters: nothing at the start, switched off without a trace, scaled as their papers say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from student_fixtures import LORA, reference, run, stirred, tiny_student

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig
from cosr_jax.student.lora import (
    adapted_names,
    count_parameters,
    init_lora,
    joined_product,
    joins,
    lora_scale,
    merged_product,
    merges,
)
from cosr_jax.student.model import LINEARS, abstract_student, merge
from cosr_jax.types import UserError


@pytest.fixture
def student():
    return tiny_student()


@pytest.fixture
def prompts():
    return reference("tiny_llama")["prompts"]


def test_fresh_or_switched_off_adapters_leave_every_bit_alone(student, prompts):
    base = run(student, prompts, adapters=False)
    trained = stirred(student.lora)
    np.testing.assert_array_equal(run(student, prompts), base)
    np.testing.assert_array_equal(run(student, prompts, adapters=False, lora=trained), base)
    assert np.abs(run(student, prompts, lora=trained) - base).max() > 0.1


def test_an_adapter_adds_scale_times_a_b(student, prompts):
    """Adapted logits equal those of a base whose kernels hold W + scale * A B."""
    lora, scale = stirred(student.lora), lora_scale(LORA)
    adapters = {path: v.get_raw_value() for path, v in lora.flat_state()}
    merged = {}
    for path, variable in student.base.flat_state():
        value = variable.get_raw_value()
        if (*path[:-1], "lora_a") in adapters:
            value = value + scale * adapters[*path[:-1], "lora_a"] @ adapters[*path[:-1], "lora_b"]
        merged[path] = variable.replace(value)
    whole = dataclasses.replace(student, base=nnx.State.from_flat_path(merged))
    np.testing.assert_allclose(
        run(whole, prompts, adapters=False), run(student, prompts, lora=lora), atol=1e-4
    )


def test_scale_follows_the_papers():
    assert lora_scale(LoraConfig(rank=16, alpha=32.0)) == 2.0
    assert lora_scale(LoraConfig(rank=16, alpha=32.0, rank_stabilised=True)) == 8.0


def test_targets_are_full_matches():
    assert adapted_names(LoraConfig(targets=(r"attn\.[qv]_proj",)), LINEARS) == (
        "attn.q_proj",
        "attn.v_proj",
    )
    assert adapted_names(LoraConfig(), LINEARS) == LINEARS
    with pytest.raises(UserError, match="'attn' matches no linear"):
        adapted_names(LoraConfig(targets=("attn",)), LINEARS)


def test_only_targets_have_adapters(student):
    config = LoraConfig(rank=2, targets=(r"mlp\.up_proj",))
    lora = abstract_student(student.config, StudentConfig(), config).lora
    paths = {".".join(path) for path, _ in lora.flat_state()}
    assert paths == {"layers.mlp.up_proj.lora_a", "layers.mlp.up_proj.lora_b"}
    assert count_parameters(lora) == 3 * 2 * (32 + 56)


def test_start_values_are_peft_s_and_do_not_depend_on_the_mesh(student):
    abstract = abstract_student(student.config, StudentConfig(), LoraConfig(rank=4)).lora
    alone = init_lora(abstract, seed=3)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    spread = init_lora(abstract, seed=3, mesh=mesh)
    for (path, a), (_, b) in zip(alone.flat_state(), spread.flat_state(), strict=True):
        value = np.asarray(a.get_raw_value())
        np.testing.assert_array_equal(value, np.asarray(b.get_raw_value()))
        assert value.dtype == np.float32
        bound = value.shape[-2] ** -0.5
        if path[-1] == "lora_b":
            assert not value.any()
        else:
            assert 0.9 * bound < np.abs(value).max() <= bound and abs(value.mean()) < bound / 4
    other = jax.tree.leaves(init_lora(abstract, seed=4))
    assert not np.array_equal(other[0], jax.tree.leaves(alone)[0])


@pytest.mark.parametrize("product", [merged_product, joined_product])
def test_one_product_is_that_of_weight_and_adapter_in_value_and_gradient(product):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (40, 12), (12, 20), (12, 3), (3, 20), (40, 20)
    x, kernel, a, b, pull = map(jax.random.normal, keys, shapes)

    def apart(x, a, b):
        return x @ kernel + 0.7 * (x @ a) @ b

    def together(x, a, b):
        return product(x, kernel, a, b, 0.7)

    for function in (apart, together):
        out, backward = jax.vjp(function, x, a, b)
        found = (out, *backward(pull))
        if function is apart:
            expected = found
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_where_that_is_cheaper_and_as_exact():
    a, b = jnp.zeros((64, 4)), jnp.zeros((4, 64))  # 64 x 64 / (64 + 64) = 32 tokens
    assert not merges(jnp.zeros((32, 64)), a, b)
    assert merges(jnp.zeros((33, 64)), a, b)
    assert not merges(jnp.zeros((33, 64), jnp.bfloat16), a, b)


def test_adapters_are_joined_on_a_cpu_where_what_comes_out_is_wide(monkeypatch):
    wide, narrow = jnp.zeros((64, 192)), jnp.zeros((192, 64))  # 64 x 192 / (192 - 64) = 96 tokens
    assert not joins(jnp.zeros((96, 64)), wide)
    assert joins(jnp.zeros((97, 64)), wide)
    assert not joins(jnp.zeros((9999, 192)), narrow)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert not joins(jnp.zeros((97, 64)), wide)


def test_dropout_acts_on_adapters_only_and_only_with_a_key(student, prompts):
    config = dataclasses.replace(LORA, dropout=0.5)
    graphdef = abstract_student(student.config, StudentConfig(), config).graphdef
    tokens = jnp.asarray(prompts[:1])
    layout = (jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(adapters, lora, key):
        return merge(graphdef, lora, student.base)(tokens, *layout, adapters, key)

    lora, key = stirred(student.lora), jax.random.key(0)
    dropped = hidden(True, lora, key)
    assert not np.array_equal(dropped, hidden(True, lora, None))
    assert not np.array_equal(dropped, hidden(True, lora, jax.random.key(1)))
    np.testing.assert_array_equal(dropped, hidden(True, lora, key))
    np.testing.assert_array_equal(hidden(False, lora, key), hidden(False, lora, None))
