"""A tiny student of 304 tokens, its tokenizer, and what a plain forward pass says."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax.config import LoraConfig, RolloutConfig, StudentConfig
from cosr_jax.rollout.jax_sampler import JaxSampler
from cosr_jax.student.lora import init_lora
from cosr_jax.student.model import ModelConfig, Student, abstract_student, merge, random_base


class NumberChat:
    """Writes token ids as numbers; one token in eight ends an answer, pad included."""

    def __init__(self, vocab: int):
        self.stop_ids = tuple(range(0, vocab, 8))
        self.pad_id = self.stop_ids[1]

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        return tuple(int(word) for word in prompt.split())

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return (*self.encode_prompt(text), self.stop_ids[0])

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids if token not in self.stop_ids)


def moved_adapters(abstract: Student, mesh: Mesh | None) -> nnx.State:
    """Adapters off their start; equal values on every mesh."""
    leaves, treedef = jax.tree.flatten(init_lora(abstract.lora, 0, mesh))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        jax.device_put(x + 0.05 * jax.random.normal(k, x.shape), x.sharding)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


@functools.cache
def tiny_student(vocab: int = 304, mesh: Mesh | None = None) -> Student:
    """A float32 student with adapters off their start; equal values on every mesh."""
    config = ModelConfig(vocab, 32, 64, 2, 8, 4, 8, 1e-6, 10_000.0, True)
    abstract = abstract_student(config, StudentConfig(), LoraConfig(rank=4, alpha=8.0))
    base = random_base(abstract.base, 0, mesh)
    # A larger base makes the tiny model's predictions far from uniform.
    base = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, base)
    return Student(config, abstract.graphdef, moved_adapters(abstract, mesh), base)


def make_engine(student: Student, mesh: Mesh | None = None, **config) -> JaxSampler:
    chat = NumberChat(student.config.vocab_size)
    return JaxSampler(student, chat, RolloutConfig(**config), mesh)


def make_prompts(lengths: Sequence[int], vocab: int = 304) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(0, vocab, length).tolist()) for length in lengths]


_WIDTH = 48


@functools.cache
def _forward(graphdef: nnx.GraphDef):
    @jax.jit
    def logits(lora, base, tokens, mask):
        module = merge(graphdef, lora, base)
        positions = jnp.broadcast_to(jnp.arange(_WIDTH), tokens.shape)
        return module.logits(module(tokens, positions, mask))

    return logits


def plain_logits(student: Student, tokens: Sequence[int], lora=None) -> np.ndarray:
    """float32 [len(tokens), vocab] of one sequence, without any cache."""
    row = np.zeros((1, _WIDTH), np.int32)
    row[0, : len(tokens)] = tokens
    mask = (np.arange(_WIDTH) < len(tokens))[None].astype(np.int32)
    lora = student.lora if lora is None else lora
    out = _forward(student.graphdef)(lora, student.base, row, mask)
    return np.asarray(out)[0, : len(tokens)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
