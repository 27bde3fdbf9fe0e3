"""Group advantages: hand-computed values and invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cosr_jax.train.advantages import STD_EPSILON, group_advantages


def test_unjudged_samples_neither_shift_the_mean_nor_earn_credit():
    rewards = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 1.0]])
    judged = np.array([[True, True, False], [True, True, True]])
    advantages, informative = group_advantages(rewards, judged, scale=False)
    np.testing.assert_allclose(advantages, [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(informative, [True, False])


def test_scaling_divides_by_the_sample_deviation():
    advantages, _ = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), np.ones(4, bool))
    deviation = 0.5 + STD_EPSILON  # of 1, 0, 0, 0 with n - 1
    np.testing.assert_allclose(advantages, np.array([0.75, -0.25, -0.25, -0.25]) / deviation)


@pytest.mark.parametrize("judged", [[False, False], [True, False]])
def test_a_group_with_fewer_than_two_verdicts_teaches_nothing(judged):
    advantages, informative = group_advantages(np.array([1.0, 0.0]), np.array(judged))
    assert not informative
    np.testing.assert_array_equal(advantages, [0.0, 0.0])


def test_equal_rewards_without_exact_binary_form_are_still_uninformative():
    advantages, informative = group_advantages(np.full(7, 0.1), np.ones(7, bool))
    assert not informative
    np.testing.assert_array_equal(advantages, np.zeros(7))


def test_a_judged_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([1.0, np.nan]), np.array([True, True]))
    with pytest.raises(ValueError, match="shape"):
        group_advantages(np.zeros(2), np.ones(3, bool))


@given(
    hnp.arrays(np.float64, st.integers(2, 9), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    st.booleans(),
    st.data(),
)
def test_advantages_sum_to_zero_and_keep_the_rewards_order(rewards, scale, data):
    judged = data.draw(hnp.arrays(bool, rewards.shape))
    advantages, informative = group_advantages(rewards, judged, scale=scale)
    assert abs(advantages.sum()) < 1e-5
    assert np.all(advantages[~judged] == 0)
    assert informative == (len(set(rewards[judged])) > 1)
    if informative:
        order = np.argsort(rewards[judged], kind="stable")
        assert np.all(np.diff(advantages[judged][order]) >= 0)
    shifted, _ = group_advantages(rewards + 3.0, judged, scale=scale)
    np.testing.assert_allclose(shifted, advantages, atol=1e-6)
