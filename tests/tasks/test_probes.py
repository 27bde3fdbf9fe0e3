import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.config import parse_cells
from cosr_jax.tasks.probes import build_probes, expand_cells
from cosr_jax.tasks.splits import split_of
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import Task, UserError

SUITE = ProceduralSuite()


class FewTasks:
    """A source with ``size`` tasks in its one cell, drawn round and round."""

    def __init__(self, size):
        self.size = size

    def cells(self):
        return ("few/1",)

    def draw(self, cell, seed, split):
        n = seed % self.size
        return Task("math", "few", 0.0, f"Say {n}.", str(n), f"few:{n}")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SUITE.cells()), st.integers(1, 12)), min_size=1, max_size=4),
    st.sampled_from(("validation", "test")),
)
def test_probes_are_distinct_held_out_and_repeatable(cells, split):
    probes = build_probes(SUITE, "p", cells, split)
    assert probes == build_probes(ProceduralSuite(), "p", cells, split)
    keys = [task.key for task in probes.tasks]
    assert len(keys) == len(set(keys))
    assert {split_of(key) for key in keys} == {split}
    missing = {cell: found for cell, _, found in probes.shortfalls}
    for cell, count in expand_cells(SUITE, cells).items():
        found = sum(task.cell == cell for task in probes.tasks)
        assert found == missing.get(cell, count) <= count


def test_wildcards_expand_and_the_largest_count_holds():
    counts = expand_cells(SUITE, parse_cells("*:3,addition/*:5,addition/2:40,addition/2:7", "k"))
    assert tuple(counts) == SUITE.cells()
    assert counts["addition/1"] == 5 and counts["addition/2"] == 40 and counts["units/3"] == 3


@pytest.mark.parametrize("name", ["additions/2", "addition/9", "add/*"])
def test_unknown_cells_are_refused(name):
    with pytest.raises(UserError, match=r"no cell of the task source; its skills are addition, "):
        build_probes(SUITE, "p", [(name, 3)], "test")


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_a_small_cell_gives_all_it_has_and_says_so(size):
    probes = build_probes(FewTasks(size), "p", [("few/1", 100)], "test")
    assert len(probes.tasks) == size
    assert probes.shortfalls == (("few/1", 100, size),)


def test_one_digit_sums_are_found_completely():
    cells = [("addition/1", 1000)]
    found = {
        task.key
        for split in ("train", "validation", "test")
        for task in build_probes(SUITE, "p", cells, split).tasks
    }
    assert found == {f"addition:{a}+{b}" for a in range(10) for b in range(a + 1)}


def test_two_hundred_two_digit_additions_are_there():
    probes = build_probes(SUITE, "p", [("addition/2", 200)], "test")
    assert len(probes.tasks) == 200 and not probes.shortfalls


def test_the_hash_is_of_the_tasks():
    probes = build_probes(SUITE, "p", [("addition/2", 5)], "test")
    records = [dataclasses.asdict(task) for task in probes.tasks]
    text = json.dumps(records, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert probes.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert probes.sha256 == build_probes(SUITE, "q", [("addition/2", 5)], "test").sha256
    assert probes.sha256 != build_probes(SUITE, "p", [("addition/2", 5)], "validation").sha256
