"""Decoding in bfloat16, which XLA's CPU backend knows in some forms of product only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_fixtures import (
    log_softmax,
    make_engine,
    make_prompts,
    moved_adapters,
    plain_logits,
    tiny_student,
)

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.model import Student, abstract_student
from cosr_jax.types import SamplingParams


@functools.cache
def short_student() -> Student:
    """``tiny_student`` with weights and products in bfloat16."""
    wide = tiny_student()
    config = StudentConfig(param_dtype="bfloat16", compute_dtype="bfloat16")
    abstract = abstract_student(wide.config, config, LoraConfig(rank=4, alpha=8.0))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide.base)
    return Student(wide.config, abstract.graphdef, moved_adapters(abstract, None), base)


@pytest.mark.parametrize("max_rows", [6, 2])  # all at once, prompts shared; and refilled
@pytest.mark.parametrize("has_copy", [True, False])
def test_log_probabilities_are_those_of_a_plain_forward_pass(has_copy, max_rows):
    student = short_student()
    engine = make_engine(student, max_rows=max_rows, decoding_copy=has_copy)
    engine.set_adapters(student.lora)
    prompts = make_prompts([5, 9])
    groups = engine.generate(prompts, 3, SamplingParams(temperature=1.0, max_new_tokens=8), seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            tokens = (*prompt, *completion.token_ids)
            wanted = log_softmax(plain_logits(student, tokens))[len(prompt) - 1 : -1]
            wanted = np.take_along_axis(wanted, np.array(completion.token_ids)[:, None], 1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, wanted, atol=0.15)
