"""Training beside a packed base: same gradients, falling loss, and one wide kernel at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_fixtures import LORA, TINY, sft_rows, stirred

from cosr_jax.config import MeshConfig, StudentConfig, TrainConfig
from cosr_jax.run.plan import abstract_batch
from cosr_jax.sharding import make_mesh, state_shardings
from cosr_jax.student.lora import init_lora
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.student.quantised import dequantised
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import SftObjective
from cosr_jax.train.step import init_state, make_train_step

TRAIN = TrainConfig(microbatch_size=8)


@functools.cache
def packed_student() -> Student:
    config = StudentConfig(quantise="nf4", quantise_block=4)
    abstract = abstract_student(TINY, config, LORA)
    base = random_base(abstract.base, 0)
    return dataclasses.replace(abstract, base=base, lora=stirred(init_lora(abstract.lora, 0)))


def losses_and_adapters(student, steps, mesh=None):
    step = make_train_step(student, SftObjective(), TRAIN, mesh)
    state = init_state(jax.tree.map(jnp.copy, student.lora), TRAIN, mesh)
    batch, losses = sft_rows(shards=1 if mesh is None else 4), []
    for _ in range(steps):
        state, metrics = step(state, student.base, batch, 1e-2)
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.leaves(state.lora)


@functools.cache
def alone():
    return losses_and_adapters(packed_student(), 4)


@pytest.mark.slow
def test_steps_are_those_of_the_widened_student():
    student = packed_student()
    losses, adapters = alone()
    wide = dataclasses.replace(student, base=dequantised(student.base, jnp.float32))
    wanted, wide_adapters = losses_and_adapters(wide, 4)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for got, other in zip(adapters, wide_adapters, strict=True):
        np.testing.assert_allclose(got, other, rtol=0, atol=1e-4)


def test_the_loss_falls_and_a_mesh_takes_the_same_steps():
    student, mesh = packed_student(), make_mesh(MeshConfig(1, 4, 2))
    base = jax.device_put(student.base, state_shardings(mesh, student.base))
    lora = jax.device_put(student.lora, state_shardings(mesh, student.lora))
    spread = dataclasses.replace(student, base=base, lora=lora)
    losses, adapters = losses_and_adapters(spread, 4, mesh)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    np.testing.assert_allclose(losses, alone()[0], rtol=1e-5)
    for got, other in zip(adapters, alone()[1], strict=True):
        np.testing.assert_allclose(got, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind, remat",
    [("nf4", "none")]
    + [
        pytest.param(kind, remat, marks=pytest.mark.slow)
        for kind, remat in (("nf4", "layer"), ("int8", "none"), ("int8", "layer"))
    ],
)
def test_no_more_than_a_layer_is_ever_wide(kind, remat):
    """By the compiler's own figure, forward and backward."""
    layers, hidden, mlp = 8, 256, 1024
    model = ModelConfig(64, hidden, mlp, layers, 2, 2, 128, 1e-6, 1e4, True)
    student = abstract_student(model, StudentConfig(quantise=kind, remat=remat), LORA)
    train = TrainConfig(microbatch_size=1)
    step = make_train_step(student, SftObjective(), train)
    state = jax.eval_shape(lambda lora: init_state(lora, train), student.lora)
    batch = abstract_batch(batch_shape(1, 1, 8, 8), False)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    memory = step.lower(state, student.base, batch, rate).compile().memory_analysis()
    wide_layer = 4 * (4 * hidden * hidden + 3 * hidden * mlp)
    print(f"{memory.temp_size_in_bytes / wide_layer:.2f} layers")
    # Without recomputation, activations are kept: 16 tokens' in every layer, and their gradients.
    assert memory.temp_size_in_bytes < {"none": 3.5, "layer": 2.5}[remat] * wide_layer
