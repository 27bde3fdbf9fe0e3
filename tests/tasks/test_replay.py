import collections
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.tasks.replay import ReplayBuffer
from cosr_jax.types import Task, level_difficulty


def task(n, skill="addition", level=1):
    return Task("math", skill, level_difficulty(level), f"Say {n}.", str(n), f"{skill}:{n}")


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 20))
def test_the_latest_distinct_tasks_stay(numbers, capacity):
    buffer = ReplayBuffer(capacity)
    buffer.add(task(n) for n in numbers)
    newest_first = list(dict.fromkeys(reversed(numbers)))[:capacity]
    held = [record["answer"] for record in buffer.state_dict()["tasks"]]
    assert held == [str(n) for n in reversed(newest_first)]
    assert len(buffer) == len(newest_first)


def test_a_crowded_cell_does_not_crowd_out_the_others():
    buffer = ReplayBuffer(1000)
    buffer.add(task(n, "addition", 1) for n in range(500))
    buffer.add(task(n, "units", 2) for n in range(60))
    rng = np.random.default_rng(0)
    cells = collections.Counter(t.cell for _ in range(100) for t in buffer.draw(10, rng))
    assert abs(cells["units/2"] - 500) < 80  # 5 standard deviations of Binomial(1000, 1/2)


def test_draws_are_distinct_limited_to_cells_and_at_most_all():
    buffer = ReplayBuffer(100)
    buffer.add(task(n, skill) for skill in ("addition", "units") for n in range(8))
    rng = np.random.default_rng(0)
    drawn = buffer.draw(50, rng, cells=("units/1",))
    assert sorted(t.key for t in drawn) == sorted(f"units:{n}" for n in range(8))
    assert len({t.task_id for t in buffer.draw(50, rng)}) == 16
    assert len(buffer) == 16  # drawing takes nothing out
    assert buffer.draw(3, rng, cells=()) == []
    assert ReplayBuffer(3).draw(3, rng) == []
    assert buffer.cells() == ("addition/1", "units/1")


def test_state_goes_through_json_and_continues_identically():
    buffer, restored = ReplayBuffer(10), ReplayBuffer(10)
    buffer.add(task(n, skill) for n in range(7) for skill in ("addition", "units"))
    restored.add([task(99, "sorting")])
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    for each in (buffer, restored):
        each.add([task(7), task(3)])
    assert restored.state_dict() == buffer.state_dict()
    draws = [b.draw(6, np.random.default_rng(5)) for b in (buffer, restored)]
    assert draws[0] == draws[1] and len(draws[0]) == 6


def test_a_smaller_buffer_keeps_the_newest_of_a_larger_state():
    large, small = ReplayBuffer(10), ReplayBuffer(2)
    large.add(task(n) for n in range(5))
    small.load_state_dict(large.state_dict())
    assert [t["answer"] for t in small.state_dict()["tasks"]] == ["3", "4"]


def test_capacity_must_hold_something():
    with pytest.raises(ValueError, match="0"):
        ReplayBuffer(0)
