"""QLoRA of an 8B student on one TPU chip, by the real TPU compiler."""

from __future__ import annotations

import pytest
from topology_fixtures import compiled_memory

#: Qwen3-8B's shape, nf4, rank 16; 8 sequences of 512 + 512 tokens, one at a time.
PROGRAM = """
import json
from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.run.plan import compile_step, topology_devices
from cosr_jax.sharding import make_mesh
from cosr_jax.student.model import ModelConfig, abstract_student
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import SftObjective

model = ModelConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, False, qk_norm=True)
form = StudentConfig(param_dtype="bfloat16", compute_dtype="bfloat16", quantise="nf4")
student = abstract_student(model, form, LoraConfig(rank=16))
mesh = make_mesh(MeshConfig(1, 1, 1), topology_devices("v5e:1x1"))
train = TrainConfig(microbatch_size=1, logit_chunk=1024)
memory = compile_step(student, SftObjective(), train, batch_shape(8, 1, 512, 512, 1), mesh)
print(json.dumps({"arguments": memory.arguments, "temporary": memory.temporary}))
"""


@pytest.mark.slow
@pytest.mark.topology
def test_qlora_of_an_8b_student_fits_one_v5e_chip():
    memory = compiled_memory(PROGRAM)
    # Embedding and output 2.3, kernels of 4.25 bits 3.4, adapters and moments 0.5 GiB.
    assert 6.2 * 2**30 < memory["arguments"] <= 6.5 * 2**30
    # 2.35 GiB (libtpu 0.0.51); a wide stack of layers would be 13 GiB.
    assert 0 < memory["temporary"] <= 2.75 * 2**30
