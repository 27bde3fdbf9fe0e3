"""Experts of gpt-oss' widths on TPU chips: grouped products, by the real TPU compiler."""

from __future__ import annotations

import pytest
from topology_fixtures import compiled_memory

#: Two layers, adapters everywhere; 8 sequences of 512 + 512 tokens on 1 x 2 x 2 chips.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from cosr_jax.config import GrpoConfig, LoraConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.run.plan import abstract_batch, topology_devices
from cosr_jax.sharding import make_mesh
from cosr_jax.student.families import MoeConfig
from cosr_jax.student.model import ModelConfig, abstract_student
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import GrpoObjective
from cosr_jax.train.step import batch_shards, init_state, make_train_step

moe = MoeConfig(32, 4, 2880, True, clamped=True)
model = ModelConfig(
    8192, 2880, 2880, 2, 64, 8, 64, 1e-5, 150000.0, False, qkv_bias=True, output_bias=True,
    attention_sinks=True, sliding_window=128, sliding_layers=(0,), moe=moe,
)
form = StudentConfig(
    param_dtype="bfloat16", compute_dtype="bfloat16", quantise=sys.argv[1], quantise_block=32
)
student = abstract_student(model, form, LoraConfig(rank=16))
mesh, train = make_mesh(MeshConfig(1, 2, 2), topology_devices("v5e:2x2")), TrainConfig()
shape = batch_shape(8, 8, 512, 512, batch_shards(mesh))
step = make_train_step(student, GrpoObjective(GrpoConfig(), 1.0, 8 * 512), train, mesh)
state = jax.eval_shape(lambda lora: init_state(lora, train), student.lora)
rate = jax.ShapeDtypeStruct((), jnp.float32)
compiled = step.lower(state, student.base, abstract_batch(shape, False), rate).compile()
calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
stats = compiled.memory_analysis()
print(json.dumps({
    "arguments": stats.argument_size_in_bytes,
    "temporary": stats.temp_size_in_bytes,
    "grouped": sum(bool(re.match(r" *%ragged-dot-none", line)) for line in calls),
}))
"""


@pytest.mark.slow
@pytest.mark.topology
@pytest.mark.parametrize("quantise", ["none", "mxfp4"])
def test_experts_are_grouped_products_of_the_chip_s_own(quantise):
    memory = compiled_memory(PROGRAM, quantise)
    # Kernel, A and B of both linears, forward, most of them again, and what they hand back.
    assert memory["grouped"] >= 20
    # 2.8 GiB (libtpu 0.0.51); every row with every expert, 16 x 16384 x 5760, is as much alone.
    assert 0 < memory["temporary"] < 3.5 * 2**30
