"""Limits hold to the last call, token and cent, whatever is under way."""

import json

import pytest

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.budget import Budget, Room
from cosr_jax.curator.calls import Charge


def budget(**limits):
    off = dict.fromkeys(("calls_per_run", "tokens_per_run", "dollars_per_run"), 0)
    off |= dict.fromkeys(("calls_per_round", "tokens_per_round", "dollars_per_round"), 0)
    return Budget(CuratorLlmConfig(**{**off, **limits}))


def test_a_limit_may_be_reached_and_not_passed():
    made = budget(tokens_per_run=100)
    made.charge(Charge(1, 40, 20))
    assert made.room(Charge(1, 30, 10)) == (Room.YES, "")
    assert made.room(Charge(1, 30, 11)) == (Room.NO, "tokens_per_run")


def test_what_is_set_aside_may_come_back():
    made = budget(calls_per_run=2)
    made.reserve(Charge(1))
    made.reserve(Charge(1))
    assert made.room(Charge(1)) == (Room.LATER, "calls_per_run")
    with pytest.raises(ValueError, match="within calls_per_run"):
        made.reserve(Charge(1))
    made.settle(Charge(1), Charge())  # it was not sent after all
    assert made.room(Charge(1)) == (Room.YES, "")
    made.settle(Charge(1), Charge(1))
    made.reserve(Charge(1))
    made.settle(Charge(1), Charge(1))
    assert made.room(Charge(1)) == (Room.NO, "calls_per_run")


def test_dollars_are_counted_to_the_picodollar():
    made = budget(dollars_per_round=0.1)
    for _ in range(10):
        made.reserve(Charge(picodollars=10**10))  # a cent
        made.settle(Charge(picodollars=10**10), Charge(picodollars=10**10))
    assert made.room(Charge(picodollars=1)) == (Room.NO, "dollars_per_round")


def test_a_round_begins_once_and_the_run_goes_on():
    made = budget(calls_per_round=1, calls_per_run=3)
    made.start_round(1)
    made.charge(Charge(1))
    made.start_round(1)  # as after a checkpoint
    assert made.room(Charge(1)) == (Room.NO, "calls_per_round")
    made.start_round(2)
    made.charge(Charge(1))
    made.start_round(3)
    made.charge(Charge(1))
    made.start_round(4)
    assert made.room(Charge(1)) == (Room.NO, "calls_per_run")


def test_what_is_under_way_is_not_saved():
    made, restored = budget(calls_per_run=2), budget(calls_per_run=2)
    made.start_round(4)
    made.charge(Charge(1, 10, 5, 7))
    made.reserve(Charge(1))
    restored.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert restored.spent_in_run == restored.spent_in_round == Charge(1, 10, 5, 7)
    assert made.room(Charge(1))[0] is Room.LATER and restored.room(Charge(1))[0] is Room.YES
    restored.start_round(4)
    assert restored.spent_in_round.calls == 1


def test_no_limit_is_none():
    assert budget().room(Charge(10**9, 10**12, 10**12, 10**18)) == (Room.YES, "")
