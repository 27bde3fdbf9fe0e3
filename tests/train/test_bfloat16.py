"""Weights and products in bfloat16, which XLA's CPU backend knows in some forms only."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_fixtures import FAMILIES, LORA, stirred, write_folder
from train_fixtures import grpo_rows

from cosr_jax.config import StudentConfig
from cosr_jax.student.model import merge
from cosr_jax.student.weights import load_student
from cosr_jax.train.logprobs import batch_logprobs


def value_and_gradient(name, dtype, batch):
    """Mean log-probability of the completions under adapters off their start, its gradient."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), name)
        config = StudentConfig(source=folder, param_dtype=dtype, compute_dtype=dtype)
        student = load_student(config, LORA)

    @jax.jit
    def run(lora, base):
        def mean(lora):
            module = merge(student.graphdef, lora, base)
            logprobs, _, _ = batch_logprobs(module, batch, 1.0, 64)
            return jnp.where(batch.completion_mask, logprobs, 0).sum() / batch.completion_mask.sum()

        return jax.value_and_grad(mean)(lora)

    value, gradient = run(stirred(student.lora), student.base)
    return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    "name",
    ["tiny_llama"] + [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_loss_and_gradient_stay_close_to_those_of_float32(name, is_shared):
    batch = grpo_rows()
    if is_shared:
        every = slice(None, None, 4)
        batch = dataclasses.replace(
            batch, prompt_tokens=batch.prompt_tokens[every], prompt_mask=batch.prompt_mask[every]
        )
    value, gradient = value_and_gradient(name, "bfloat16", batch)
    expected, wanted = value_and_gradient(name, "float32", batch)
    assert value == pytest.approx(expected, rel=0.02)
    cosine = gradient @ wanted / np.linalg.norm(gradient) / np.linalg.norm(wanted)
    # Where rounding makes gpt-oss' routers choose another expert, the gradient goes with it.
    assert cosine > (0.95 if name == "family_gpt_oss" else 0.98)
    assert np.linalg.norm(gradient) == pytest.approx(np.linalg.norm(wanted), rel=0.1)
