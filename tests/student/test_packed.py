import jax.numpy as jnp
import numpy as np
import pytest

from cosr_jax.student.packed import pack, zeros


@pytest.mark.parametrize("axis", [-1, -2])
def test_eight_bits_are_off_by_half_a_step_of_the_largest(axis):
    x = np.random.default_rng(0).normal(0, 3, (4, 5, 6)).astype(np.float32)
    x[0] = 0.0
    packed = pack(jnp.asarray(x), zeros(x.shape, jnp.int8, axis), axis)
    largest = np.abs(x).max(axis, keepdims=True)
    assert packed.values.dtype == jnp.int8 and packed.scale.shape == largest.shape
    gap = np.abs(np.asarray(packed.astype(jnp.float32)) - x)
    assert (gap <= largest / 254 * 1.001).all() and gap.max() > 0
    assert not gap[0].any()


def test_other_dtypes_are_only_cast():
    x = jnp.asarray([[1.0, 2.0, 1 / 3]])
    assert (pack(x, zeros(x.shape, jnp.float32, -1), -1) == x).all()
    assert pack(x, zeros(x.shape, jnp.bfloat16, -1), -1).dtype == jnp.bfloat16
