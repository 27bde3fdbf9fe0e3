import json
import math
import random

import pytest

from cosr_jax.curator import bandit
from cosr_jax.curator.bandit import Arm

ARMS = ("a", "b", "c", "d")


def test_bound_is_value_plus_scaled_root_of_log_pulls():
    state = {"here": {"a": Arm(3, 0.5), "b": Arm(1, 0.2)}, "there": {"a": Arm(50, 0.0)}}
    ucb = bandit.bounds(state, "here", ("a", "b", "c"), 0.5)
    assert ucb["a"] == pytest.approx(0.5 + 0.5 * math.sqrt(math.log(4) / 3))
    assert ucb["b"] == pytest.approx(0.2 + 0.5 * math.sqrt(math.log(4) / 1))
    assert ucb["c"] == math.inf


def test_arms_never_pulled_come_first_in_the_given_order():
    state: bandit.BanditState = {}
    order = []
    for _ in ARMS:
        arm = bandit.select(state, "x", ARMS, 1.0)
        order.append(arm)
        state = bandit.update(state, "x", arm, 1.0 if arm == "a" else 0.0)
    assert tuple(order) == ARMS
    assert bandit.select(state, "x", ARMS, 0.0) == "a"
    assert bandit.select(state, "y", ARMS, 0.0) == "a"  # contexts are learnt apart
    assert bandit.select(state, "x", ("d", "c"), 0.0) == "d"  # a tie, and "a" is not eligible


def test_update_keeps_the_mean_and_leaves_the_old_state_alone():
    old = bandit.update({}, "x", "a", 0.25)
    new = bandit.update(old, "x", "a", 0.75)
    assert old == {"x": {"a": Arm(1, 0.25)}}
    assert new == {"x": {"a": Arm(2, 0.5)}}


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="no arm is eligible in context 'x'"):
        bandit.select({}, "x", (), 1.0)
    with pytest.raises(ValueError, match="is nan"):
        bandit.update({}, "x", "a", math.nan)


def bernoulli(mean, rng):
    return float(rng.random() < mean)


def gaussian(mean, rng):
    return rng.gauss(mean, 0.2)


MEANS = {
    "low": {"a": 0.8, "b": 0.5, "c": 0.4, "d": 0.2},
    "high": {"a": 0.1, "b": 0.2, "c": 0.5, "d": 0.9},
}


def play(draw, seed, rounds):
    """Pseudo-regret after each round, contexts drawn at random."""
    rng = random.Random(seed)
    state: bandit.BanditState = {}
    regret, curve = 0.0, []
    for _ in range(rounds):
        context = rng.choice(("low", "high"))
        arm = bandit.select(state, context, ARMS, 1.0)
        state = bandit.update(state, context, arm, draw(MEANS[context][arm], rng))
        regret += max(MEANS[context].values()) - MEANS[context][arm]
        curve.append(regret)
    return curve


@pytest.mark.parametrize("draw", [bernoulli, gaussian])
def test_regret_is_sublinear(draw):
    rounds, seeds = 4000, range(5)
    curves = [play(draw, seed, rounds) for seed in seeds]
    mean = [sum(values) / len(curves) for values in zip(*curves, strict=True)]

    # Auer et al. 2002, Theorem 1, with exploration sqrt(2 ln t / n); ours explores less.
    bound = 0.0
    for means in MEANS.values():
        gaps = [max(means.values()) - m for m in means.values() if m < max(means.values())]
        bound += sum(8 * math.log(rounds / 2) / g + (1 + math.pi**2 / 3) * g for g in gaps)
    assert mean[-1] < bound

    random_arm = sum(max(m.values()) - sum(m.values()) / len(m) for m in MEANS.values()) / 2
    assert mean[-1] < 0.1 * random_arm * rounds
    first, second = mean[rounds // 2 - 1], mean[-1] - mean[rounds // 2 - 1]
    assert second < 0.5 * first  # linear regret would make the halves equal


def test_state_survives_json_bit_for_bit():
    rng = random.Random(0)
    state: bandit.BanditState = {}
    for _ in range(200):
        arm = bandit.select(state, "x", ARMS, 1.0)
        state = bandit.update(state, "x", arm, rng.random())
    again = bandit.from_dict(json.loads(json.dumps(bandit.to_dict(state), sort_keys=True)))
    assert again == state
    assert bandit.bounds(again, "x", ARMS, 1.0) == bandit.bounds(state, "x", ARMS, 1.0)
