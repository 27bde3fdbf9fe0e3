"""Changes of hyper-parameters: within their ranges, for one round, kept only while they pay."""

import json

import pytest
from test_procedural import CELLS, around, diagnosis, seen

from cosr_jax.config import CuratorConfig, from_config_dict
from cosr_jax.curator import tuning
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.types import UserError

WIDE = {"kl_low": 0.25, "kl_high": 3.0, "group_low": 4, "group_high": 16}


def curator(**changes):
    config = CuratorConfig(focus=("addition/2",), **{**WIDE, **changes})
    return ProceduralCurator(config, CELLS, 8, 4, has_kl=True)


def situation(**changes):
    usual = {
        "group_size": 8,
        "has_kl": True,
        "has_fallen": False,
        "gains": (),
        "informative": 0.7,
    }
    return tuning.Situation(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "name", "kl_scale", "group_size"),
    [
        ({"has_fallen": True}, "kl_up", 3.0, 0),
        ({"gains": (0.1, 0.0, -0.1)}, "kl_down", 0.25, 0),
        ({"informative": 0.3}, "group_up", 1.0, 16),
        ({"informative": 0.95}, "group_down", 1.0, 4),
        # One change a round, so that its gain can be credited.
        ({"has_fallen": True, "informative": 0.3}, "kl_up", 3.0, 0),
    ],
)
def test_measurements_call_for_one_change_within_its_range(changes, name, kl_scale, group_size):
    change = tuning.propose(CuratorConfig(**WIDE), situation(**changes))
    assert (change.name, change.kl_scale, change.group_size) == (name, kl_scale, group_size)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, WIDE),
        ({"gains": (0.0,)}, WIDE),  # one round says little
        ({"gains": (0.0, None)}, WIDE),
        ({"gains": (0.0, 0.01)}, WIDE),
        ({"has_fallen": True, "has_kl": False}, WIDE),
        ({"has_fallen": True}, {"kl_high": 1.0}),
        ({"informative": 0.3}, {}),  # by default groups keep their size
        ({"informative": 0.95}, {}),
    ],
)
def test_otherwise_nothing_changes(changes, config):
    assert tuning.propose(CuratorConfig(**config), situation(**changes)) is None


def play(c, gains, evidence=None):
    """Plans of rounds in which few groups are mixed, followed by ``gains``."""
    plans = []
    for number, gain in enumerate(gains, 1):
        rounds = evidence or (seen("addition/2", 0.6, mixed=0.4), seen("addition/3", 0.0))
        plan = c.plan(diagnosis(*rounds, number=number))
        c.observe_gain(plan, gain)
        plans.append(plan)
    return plans


def only_grpo(monkeypatch):
    monkeypatch.setattr("cosr_jax.curator.strategies._study", lambda view: None)


def test_a_change_is_for_one_round_and_taken_back_after_a_loss(monkeypatch):
    only_grpo(monkeypatch)
    c = curator(exploration=0.0, kl_low=1.0)
    plans = play(c, [-0.1, 0.1, 0.1, 0.1])
    assert [plan.group_size for plan in plans] == [16, 0, 0, 0]
    assert "groups have 16 samples instead of 8" in plans[0].reason
    assert c.decisions[0]["reason"] == plans[0].reason  # what the report tells
    assert "samples instead of" not in plans[1].reason


def test_a_change_that_pays_more_than_leaving_things_alone_is_ordered_again(monkeypatch):
    only_grpo(monkeypatch)
    plans = play(curator(exploration=0.0, kl_low=1.0), [0.1, 0.0, 0.1, 0.1])
    assert [plan.group_size for plan in plans] == [16, 0, 16, 16]


def test_when_the_reason_is_gone_the_setting_is_configs_again(monkeypatch):
    only_grpo(monkeypatch)
    c = curator(kl_low=1.0)
    (small,) = play(c, [0.1])
    (usual,) = play(c, [0.1], evidence=around(0.5, harder=0.0))
    assert (small.group_size, usual.group_size) == (16, 0)


def test_supervised_rounds_have_neither_kl_nor_groups():
    c = curator()
    plan = c.plan(diagnosis(*around(0.4), probe=0.3, best=0.9))
    assert plan.algorithm == "sft"
    assert (plan.kl_scale, plan.group_size) == (1.0, 0)


def test_validation_that_fell_raises_the_kl(monkeypatch):
    only_grpo(monkeypatch)
    plan = curator().plan(diagnosis(*around(0.4), probe=0.3, best=0.9))
    assert plan.kl_scale == 3.0 and "the KL counts 3 times" in plan.reason


def test_trials_are_remembered_across_a_restart(monkeypatch):
    only_grpo(monkeypatch)
    gains = [-0.1, 0.1, 0.1]
    whole = curator(exploration=0.0, kl_low=1.0)
    expected = play(whole, gains)
    part, plans = curator(exploration=0.0, kl_low=1.0), []
    for number, gain in enumerate(gains, 1):
        evidence = (seen("addition/2", 0.6, mixed=0.4), seen("addition/3", 0.0))
        plans.append(part.plan(diagnosis(*evidence, number=number)))
        state = json.loads(json.dumps(part.state_dict()))
        part = curator(exploration=0.0, kl_low=1.0)  # killed between plan and gain
        part.load_state_dict(state)
        part.observe_gain(plans[-1], gain)
    assert plans == expected and part.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("key", "value"), [("group_low", 1), ("group_low", 9), ("group_high", 7)])
def test_group_sizes_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"config.curator.{key}: {value} is not within"):
        from_config_dict({"curator": {key: value}})
