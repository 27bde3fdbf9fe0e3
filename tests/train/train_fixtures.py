"""A tiny student and batches for the tests of this room."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax.config import LoraConfig, StudentConfig, TrainConfig
from cosr_jax.student.lora import init_lora
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.train.batching import TrainBatch, batch_shape, grpo_batch, sft_batch
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import make_train_step
from cosr_jax.types import Completion, Outcome, RolloutGroup, Task, Verdict

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)
LORA = LoraConfig(rank=4, alpha=8.0)


@functools.cache
def tiny_student(mesh: Mesh | None = None, seed: int = 0, lora: LoraConfig = LORA) -> Student:
    """A float32 student with random weights whose adapters already differ from zero.

    One for all tests: whoever donates its adapters copies them first.
    """
    abstract = abstract_student(TINY, StudentConfig(), lora)
    base = random_base(abstract.base, seed, mesh)
    # A larger base moves predictions away from uniform.  Much larger (x8) saturates the attention,
    # whose gradient then cancels to four digits in float32, whatever the program.
    base = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, base)
    return Student(TINY, abstract.graphdef, stirred(init_lora(abstract.lora, seed, mesh)), base)


@functools.cache
def compiled_step(
    objective: SftObjective | GrpoObjective, train: TrainConfig, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """The tiny student's step: tests that need the same program share it."""
    return make_train_step(tiny_student(mesh), objective, train, mesh)


def stirred(lora: nnx.State, scale: float = 0.05) -> nnx.State:
    """Adapters moved off their start, so that policy and reference differ."""
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        jax.device_put(x + scale * jax.random.normal(k, x.shape), x.sharding)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def group(rewards, seed: int = 0, lengths=None, prompt_length: int = 5) -> RolloutGroup:
    """A judged group; a reward of None is an ERROR verdict."""
    rng = np.random.default_rng(seed)
    lengths = lengths or rng.integers(1, 8, len(rewards))
    completions = tuple(
        Completion(
            tuple(int(t) for t in rng.integers(1, TINY.vocab_size, length)),
            tuple(float(p) for p in -rng.uniform(2.0, 6.0, length)),
            "",
            "stop",
        )
        for length in lengths
    )
    verdicts = tuple(
        Verdict(Outcome.ERROR, 0.0)
        if r is None
        else Verdict(Outcome.PASS if r else Outcome.FAIL, r)
        for r in rewards
    )
    prompt = tuple(int(t) for t in rng.integers(1, TINY.vocab_size, prompt_length))
    task = Task("math", "addition", 0.0, "1+1?", "2", f"addition:{seed}")
    return RolloutGroup(task, prompt, completions, verdicts)


def grpo_rows(samples: int = 8, microbatch: int = 8, shards: int = 1) -> TrainBatch:
    """``samples`` rows in groups of four, with different lengths."""
    groups = [
        group([1.0, 0.0, 0.0, 1.0], seed, prompt_length=3 + seed) for seed in range(samples // 4)
    ]
    shape = batch_shape(samples, microbatch, 16, 16, shards)
    batch, _ = grpo_batch(groups, shape, scale_advantages=True)
    assert batch is not None
    return batch


def sft_rows(samples: int = 8, microbatch: int = 8, shards: int = 1) -> TrainBatch:
    """``samples`` examples of different lengths."""
    rng = np.random.default_rng(3)
    examples = [
        (
            rng.integers(1, TINY.vocab_size, 3 + i % 5).tolist(),
            rng.integers(1, TINY.vocab_size, 1 + i % 7).tolist(),
        )
        for i in range(samples)
    ]
    return sft_batch(examples, batch_shape(samples, microbatch, 16, 16, shards))
