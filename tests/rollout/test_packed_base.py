"""Decoding with packed kernels: what the widened ones would say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_fixtures import make_engine, make_prompts, tiny_student

from cosr_jax.student.quantised import Quantised, dequantised, quantise
from cosr_jax.types import SamplingParams


@pytest.mark.slow
def test_completions_are_those_of_the_widened_student():
    student = tiny_student()

    def packed(path, variable):
        if path[-1] != "kernel":
            return variable
        axes = variable.get_metadata()["axes"]
        value = quantise(variable.get_raw_value(), "nf4", 8)
        return variable.replace(value, axes=Quantised((*axes[:-1], None, axes[-1]), axes))

    base = jax.tree.map(jnp.copy, student.base)
    base = type(base).from_flat_path({p: packed(p, v) for p, v in base.flat_state()})
    narrow = dataclasses.replace(student, base=base)
    wide = dataclasses.replace(student, base=dequantised(base, jnp.float32))
    prompts, sampling = make_prompts([3, 7]), SamplingParams(12, 1.0, 1.0, 0)
    first, second = (
        make_engine(one, max_prompt_tokens=16, decoding_copy=copies).generate(
            prompts, 2, sampling, seed=3
        )
        for one, copies in ((narrow, True), (wide, False))
    )
    for group, other in zip(first, second, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in other]
        for one, two in zip(group, other, strict=True):
            np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-4)
