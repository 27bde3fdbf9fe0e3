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


#: A step of two layers as wide as Qwen2.5-1.5B's: 8 completions of 2 prompts, 300 + 3584 tokens.
KERNELS = """
import collections, json, re, sys
import jax, jax.numpy as jnp
from cosr_jax.config import GrpoConfig, LoraConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.run.plan import abstract_batch, topology_devices
from cosr_jax.sharding import make_mesh
from cosr_jax.student.model import ModelConfig, abstract_student
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import GrpoObjective
from cosr_jax.train.step import batch_shards, init_state, make_train_step

sizes, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
model = ModelConfig(8192, 1536, 8960, 2, 12, 2, 128, 1e-6, 1e6, True, **options)
dtypes = StudentConfig(param_dtype="bfloat16", compute_dtype="bfloat16")
student = abstract_student(model, dtypes, LoraConfig(rank=16))
mesh, train = make_mesh(MeshConfig(*sizes), topology_devices("v5e:2x2")), TrainConfig()
shape = batch_shape(8, 8, 300, 3584, batch_shards(mesh))
step = make_train_step(student, GrpoObjective(GrpoConfig(), 1.0, 8 * 3584), train, mesh)
state = jax.eval_shape(lambda lora: init_state(lora, train), student.lora)
batch = abstract_batch(shape, False, group=4)
rate = jax.ShapeDtypeStruct((), jnp.float32)
compiled = step.lower(state, student.base, batch, rate).compile()
calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
kernels = collections.Counter(re.search("splash_mha_([a-z]+)_", line)[1] for line in calls)
assert kernels == json.loads(sys.argv[3]), kernels
print(json.dumps({"temporary": compiled.memory_analysis().temp_size_in_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options", "kinds", "gib"),
    [
        ((1, 2, 2), {}, 1, 1.15),  # 1.88 in blocks
        # Two key-value heads are repeated for four chips; one layer slides.  1.33 with prompts and
        # completions in rows of their own, through the layers one after the other.
        (
            (1, 1, 4),
            {"attention_sinks": True, "sliding_window": 128, "sliding_layers": [0]},
            2,
            1.7,
        ),
    ],
)
def test_steps_attend_by_kernels_that_keep_no_scores(sizes, options, kinds, gib):
    """Prompts once, then completions; each forward pass once more where a layer is recomputed."""
    kernels = {"fwd": 4 * kinds, "dq": 2 * kinds, "dkv": 2 * kinds}
    memory = compiled_memory(KERNELS, *map(json.dumps, (sizes, options, kernels)))
    assert 0 < memory["temporary"] <= gib * 2**30
