"""Programs of an 8B-class student (Qwen3-8B's widths): compiled in time, whatever the depth."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from cosr_jax.config import GrpoConfig, LoraConfig, StudentConfig, TrainConfig
from cosr_jax.rollout import slots
from cosr_jax.run.plan import abstract_batch
from cosr_jax.student.compiling import compiler_options
from cosr_jax.student.model import ModelConfig, Student, abstract_student
from cosr_jax.train.batching import batch_shape
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import init_state, make_train_step

like = jax.ShapeDtypeStruct


def student(layers: int) -> Student:
    model = ModelConfig(
        151936, 4096, 12288, layers, 32, 8, 128, 1e-6, 1e6, tie_word_embeddings=False, qk_norm=True
    )
    dtypes = StudentConfig(param_dtype="bfloat16", compute_dtype="bfloat16")
    return abstract_student(model, dtypes, LoraConfig(rank=16))


def step(layers: int, objective: SftObjective | GrpoObjective) -> jax.stages.Lowered:
    """8 rows of 512 + 512 tokens."""
    of, train = student(layers), TrainConfig()
    batch = abstract_batch(batch_shape(8, 16, 512, 512), with_old_logprobs=False)
    state = jax.eval_shape(lambda lora: init_state(lora, train), of.lora)
    program = make_train_step(of, objective, train)
    return program.lower(state, of.base, batch, like((), jnp.float32))


def decode(layers: int) -> jax.stages.Lowered:
    """32 rows of 512 + 512 tokens."""
    of, rows = student(layers), 32
    empty = functools.partial(slots.empty_slots, of.config, rows, rows, 512, 512, jnp.bfloat16)
    stops, number = like((of.config.vocab_size,), bool), like((), jnp.float32)
    key, count = like((2,), jnp.uint32), like((), jnp.int32)
    drawing = slots.Drawing(key, stops, number, number, count)
    each, flags = like((rows,), jnp.int32), like((rows,), bool)
    turn = slots.Turn(flags, each, each, each, like((rows, 512), jnp.int32), flags, count)
    options = functools.partial(slots.decode, of.graphdef, adapters=True, greedy=False)
    program = jax.jit(
        functools.partial(options, truncated=False),
        donate_argnums=2,
        compiler_options=compiler_options(),
    )
    return program.lower(
        of.lora,
        of.base,
        jax.eval_shape(functools.partial(empty, unstacked=False)),
        drawing=drawing,
        turn=turn,
    )


PROGRAMS = {
    "sft": lambda layers: step(layers, SftObjective()),
    "grpo": lambda layers: step(layers, GrpoObjective(GrpoConfig(), 1.0, 8 * 512)),
    "decode": decode,
}


@pytest.fixture
def no_kept_programs():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_do_not_grow_with_depth_and_compile_in_a_minute(name, no_kept_programs):
    size = {layers: len(PROGRAMS[name](layers).as_text().splitlines()) for layers in (9, 36, 72)}
    assert len(set(size.values())) == 1, size
    seconds = {}
    for layers in (9, 36, 72):
        started = time.process_time()
        PROGRAMS[name](layers).compile()
        seconds[layers] = time.process_time() - started
    print(name, {layers: f"{s:.1f} CPU s" for layers, s in seconds.items()})
    # Of CPU time, which a busy machine stretches little; two cores share it.
    assert max(seconds.values()) < 60
