"""The train steps compiled by the real TPU compiler for chips that are not here."""

from __future__ import annotations

import json

import pytest
from topology_fixtures import compiled_memory

pytestmark = pytest.mark.topology

#: Qwen2.5-1.5B's shape as a Llama-family student; 16 sequences of 512 + 512 tokens; rank 32.
PROGRAM = """
import json, sys
from cosr_jax.config import GrpoConfig, LoraConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.run.plan import compile_step, topology_devices
from cosr_jax.sharding import make_mesh
from cosr_jax.student.model import ModelConfig, abstract_student
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import batch_shards

name, sizes = sys.argv[1], json.loads(sys.argv[2])
model = ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, 1e-6, 1e6, True)
dtypes = StudentConfig(param_dtype="bfloat16", compute_dtype="bfloat16")
student = abstract_student(model, dtypes, LoraConfig(rank=32))
mesh = make_mesh(MeshConfig(*sizes), topology_devices("v5e:4x4"))
objective = {
    "sft": SftObjective(),
    "grpo": GrpoObjective(GrpoConfig(kl_coef=0.1), 1.0, 16 * 512),
}[name]
train = TrainConfig(microbatch_size=16, logit_chunk=2048)
shape = batch_shape(16, 16, 512, 512, batch_shards(mesh))
memory = compile_step(student, objective, train, shape, mesh)
print(json.dumps({"temporary": memory.temporary, "total": memory.total}))
"""


@pytest.mark.slow
@pytest.mark.topology
@pytest.mark.parametrize(
    "name, sizes", [("sft", (1, 16, 1)), ("grpo", (1, 16, 1)), ("grpo", (1, 8, 2))]
)
def test_a_1_5b_student_needs_at_most_one_gib_of_temporary_memory_on_16_v5e_chips(name, sizes):
    memory = compiled_memory(PROGRAM, name, json.dumps(sizes))
    assert 0 < memory["temporary"] <= 2**30
    # Weights, moments and gradients of a chip's share; nowhere near the chip's 16 GiB.
    assert memory["total"] <= 2 * 2**30
