"""Small students of several kinds, plain and packed, and what they sample and learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rollout_fixtures import make_prompts, moved_adapters

from cosr_jax.config import LoraConfig, StudentConfig, TrainConfig
from cosr_jax.sharding import state_shardings
from cosr_jax.student.families import MoeConfig
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.student.quantised import pack_like
from cosr_jax.train.batching import TrainBatch, batch_shape, grpo_batch, sft_batch
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import batch_shards, init_state, make_train_step
from cosr_jax.types import Completion, Outcome, RolloutGroup, Task, Verdict

PLAIN = ModelConfig(64, 32, 64, 2, 8, 4, 8, 1e-6, 10_000.0, True)
#: Without experts, like Qwen3-MoE, and like gpt-oss.
MODELS = {
    "dense": PLAIN,
    "qwen3_moe": dataclasses.replace(PLAIN, qk_norm=True, moe=MoeConfig(8, 3, 16, True)),
    "gpt_oss": dataclasses.replace(
        PLAIN,
        qkv_bias=True,
        output_bias=True,
        attention_sinks=True,
        sliding_window=8,
        sliding_layers=(0,),
        moe=MoeConfig(8, 2, 16, True, clamped=True),
    ),
}
TRAIN = TrainConfig(microbatch_size=4, logit_chunk=64)
PROMPTS = make_prompts((3, 9, 5, 7), vocab=64)


def student(name: str, mesh: Mesh | None = None, quantise: str = "none") -> Student:
    """One of ``MODELS`` with adapters everywhere; equal values on every mesh."""
    model, lora = MODELS[name], LoraConfig(rank=2, alpha=4.0)
    plain = abstract_student(model, StudentConfig(), lora)
    packed = abstract_student(model, StudentConfig(quantise=quantise, quantise_block=8), lora)
    base = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, random_base(plain.base, 0))
    values = dict(base.flat_state())

    def pack(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(pack_like(variable.get_raw_value(), values[path][...]))

    base = nnx.map_state(pack, packed.base)
    if mesh is not None:
        base = jax.device_put(base, state_shardings(mesh, base))
    return Student(model, packed.graphdef, moved_adapters(packed, mesh), base)


def judged(completions: Sequence[Sequence[Completion]]) -> list[RolloutGroup]:
    """Groups of two for ``PROMPTS``, of which the first sample is right."""
    task = Task("math", "addition", 0.0, "1+1?", "2", "addition:1")
    groups = []
    for prompt, group in zip(PROMPTS, completions, strict=True):
        verdicts = [Verdict(Outcome.PASS, 1.0), Verdict(Outcome.FAIL, 0.0, "wrong_answer")]
        groups.append(RolloutGroup(task, prompt, tuple(group)).judged(verdicts))
    return groups


def grpo_rows(completions: Sequence[Sequence[Completion]], mesh: Mesh | None) -> TrainBatch:
    shape = batch_shape(8, TRAIN.microbatch_size, 16, 8, batch_shards(mesh))
    batch = grpo_batch(judged(completions), shape, scale_advantages=True)[0]
    assert batch is not None
    return batch


def sft_rows(mesh: Mesh | None) -> TrainBatch:
    rng = np.random.default_rng(3)
    examples = [(prompt, rng.integers(1, 64, 3 + i).tolist()) for i, prompt in enumerate(PROMPTS)]
    return sft_batch(examples, batch_shape(4, TRAIN.microbatch_size, 16, 8, batch_shards(mesh)))


def one_step(
    some: Student, objective: SftObjective | GrpoObjective, batch: TrainBatch, mesh: Mesh | None
) -> tuple[dict[tuple[Any, ...], np.ndarray], dict[str, float]]:
    """Adapters by path after a step, and its metrics."""
    step = make_train_step(some, objective, TRAIN, mesh)
    state = init_state(jax.tree.map(jnp.copy, some.lora), TRAIN, mesh)
    state, metrics = step(state, some.base, batch, 1e-3)
    lora = {path: np.asarray(leaf[...]) for path, leaf in state.lora.flat_state()}
    return lora, {name: float(value) for name, value in metrics.items()}
