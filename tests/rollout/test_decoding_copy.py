"""When a CPU decodes from a copy of the weights."""

from __future__ import annotations

import jax
import pytest
from rollout_fixtures import make_engine, tiny_student

from cosr_jax.rollout import jax_sampler


@pytest.mark.parametrize("more, is_copied", [(0, True), (-1, False)])
def test_only_small_students_are_copied(monkeypatch, more, is_copied):
    student = tiny_student()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(student.base))
    monkeypatch.setattr(jax_sampler, "_MOST_COPIED", size + more)
    assert make_engine(student, max_prompt_tokens=8)._unstacked is is_copied
