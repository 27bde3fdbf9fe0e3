"""Single decisions of the curator on written evidence."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.config import CuratorConfig
from cosr_jax.curator.curriculum import informative_share
from cosr_jax.curator.procedural import ProceduralCurator, reward_of_gain
from cosr_jax.curator.strategies import STRATEGIES
from cosr_jax.types import CellEvidence, Diagnosis, UserError

CELLS = tuple(f"{s}/{level}" for s in ("addition", "sorting") for level in range(1, 6))


def curator(focus=("addition/2",), **changes):
    return ProceduralCurator(CuratorConfig(focus=focus, **changes), CELLS, 8, 4)


def seen(cell, passed, value=None, form=1.0, groups=20, mixed=None):
    """Evidence of ``groups`` groups of 8; rates as fractions, mixed as a share of groups."""
    n = 8 * groups
    mixed = 1 - passed**8 - (1 - passed) ** 8 if mixed is None else mixed
    value = passed if value is None else value
    counts = (round(n * passed), round(n * value), round(n * form))
    return CellEvidence(cell, n, *counts, groups, round(groups * mixed))


def diagnosis(*evidence, number=0, probe=0.5, best=0.5):
    return Diagnosis(number, evidence, probe, best)


def around(focus, easier=0.95, harder=0.0):
    """Evidence of addition/1 to /3 with ``focus`` as addition/2's pass rate."""
    return (seen("addition/1", easier), seen("addition/2", focus), seen("addition/3", harder))


@pytest.mark.parametrize(
    ("evidence", "strategy", "algorithm", "cells", "context"),
    [
        (around(0.4), "study", "sft", {"addition/2"}, "format:ok mastery:mid"),
        (
            around(0.9, harder=0.2),
            "raise",
            "grpo",
            {"addition/2", "addition/3"},
            "format:ok mastery:high",
        ),
        (around(0.9), "reinforce", "grpo", {"addition/2"}, "format:ok mastery:high"),
        (around(1.0), "raise", "sft", {"addition/3"}, "format:ok mastery:high"),
        (around(0.02, easier=0.5), "lower", "grpo", {"addition/1"}, "format:ok mastery:low"),
        (around(0.0), "lower", "sft", {"addition/2"}, "format:ok mastery:low"),
        (around(0.1), "study", "sft", {"addition/2"}, "format:ok mastery:low"),
        # Low, but with signal enough of its own.
        (around(0.15, easier=0.5), "study", "sft", {"addition/2"}, "format:ok mastery:low"),
        # The easier level lacks the form only.
        (
            (seen("addition/1", 0.6, value=0.9), seen("addition/2", 0.03)),
            "study",
            "sft",
            {"addition/2"},
            "format:ok mastery:low",
        ),
        # Half a form: SFT teaches the rest at a fraction of GRPO's price, whatever it costs now.
        (
            (seen("addition/1", 0.5, value=0.9, form=0.6), seen("addition/2", 0.3, 0.5, 0.6)),
            "format_drill",
            "sft",
            {"addition/1"},
            "format:low mastery:mid",
        ),
        (
            (seen("addition/1", 0.5, value=0.9, form=0.6), seen("addition/2", 0.3, 0.35, 0.6)),
            "format_drill",
            "sft",
            {"addition/1"},
            "format:low mastery:mid",
        ),
        (
            (
                seen("addition/1", 0.05, value=0.9, form=0.06),
                seen("addition/2", 0.0, value=0.1, form=0.06),
                seen("sorting/1", 0.0, value=0.3, form=0.06),
            ),
            "format_drill",
            "sft",
            {"addition/1"},
            "format:low mastery:low",
        ),
        (
            (seen("addition/2", 0.0, value=0.1, form=0.0), seen("addition/3", 0.0, form=0.0)),
            "format_drill",
            "sft",
            {"addition/1"},  # no values right anywhere: the easiest of the skill
            "format:low mastery:low",
        ),
    ],
)
def test_measurements_choose_the_arm(evidence, strategy, algorithm, cells, context):
    plan = curator().plan(diagnosis(*evidence))
    assert (plan.strategy, plan.algorithm, plan.context) == (strategy, algorithm, context)
    assert cells <= {cell for cell, _ in plan.mixture}
    assert plan.mixture[0][0] in cells
    asks_for_sft = algorithm == "sft" and strategy not in ("format_drill", "study")
    assert ("no signal" in plan.reason) == asks_for_sft
    assert plan.steps == 4


def test_raise_climbs_past_mastered_levels():
    evidence = (*around(0.97, harder=0.95), seen("addition/4", 0.3))
    plan = curator().plan(diagnosis(*evidence))
    assert plan.strategy == "raise"
    assert "addition/4" in dict(plan.mixture)
    assert "addition/3" not in dict(plan.mixture)


def test_review_comes_when_a_trained_cell_falls_and_not_before():
    c = curator()
    first = c.plan(diagnosis(*around(0.5)))
    assert first.strategy == "study"
    c.plan(diagnosis(seen("addition/2", 0.7), number=1))
    fallen = c.plan(diagnosis(seen("addition/2", 0.3), number=2))
    assert fallen.strategy == "review"
    assert fallen.replay_fraction == 0.5
    assert fallen.mixture == (("addition/2", 1.0),)
    assert "addition/2 0." in fallen.reason

    untrained = curator()
    untrained.plan(diagnosis(*around(0.5)))
    untrained.plan(diagnosis(seen("addition/1", 0.3), number=1))  # fell, but was never trained
    assert [d["strategy"] for d in untrained.decisions] == ["study", "study"]


def test_the_memory_of_before_an_sft_round_is_dropped_where_there_is_fresh_evidence():
    c = curator()
    assert c.plan(diagnosis(seen("addition/2", 0.2, form=0.3))).algorithm == "sft"
    c.plan(diagnosis(seen("addition/2", 0.25, form=0.35), number=1))
    assert c.masteries["addition/2"].samples == 160.0


def test_steps_are_halved_after_a_measured_regression_only():
    assert curator().plan(diagnosis(*around(0.4), probe=0.45, best=0.5)).learning_rate_scale == 1.0
    assert curator().plan(Diagnosis(0, around(0.4), None, None)).learning_rate_scale == 1.0
    plan = curator().plan(diagnosis(*around(0.4), probe=0.4, best=0.5))
    assert plan.learning_rate_scale == 0.5
    assert "validation is at 0.40 after 0.50" in plan.reason


def test_wanted_diagnosis_asks_for_what_the_next_plan_needs():
    c = curator()
    near = ("addition/1", "addition/2", "addition/3")
    assert c.wanted_diagnosis() == near
    assert curator(focus=()).wanted_diagnosis() == CELLS

    evidence = (seen("addition/1", 0.0, value=0.9, form=0.0), seen("addition/2", 0.0, form=0.0))
    assert c.plan(diagnosis(*evidence)).algorithm == "sft"
    assert c.wanted_diagnosis() == near  # the drill has changed them all

    small = tuple(seen(e.cell, p, groups=4) for e, p in zip(around(0), (0.9, 0.4, 0), strict=True))
    study = c.plan(diagnosis(*small, number=1))
    assert study.strategy == "study"
    c.observe_gain(study, -1.0)
    assert c.wanted_diagnosis() == near
    asked = []
    for number in range(2, 7):
        plan = c.plan(diagnosis(*(small if number == 2 else small[1:2]), number=number))
        assert plan.algorithm == "grpo"
        asked.append(c.wanted_diagnosis())
    # 32 samples fade under one group's 8 after four rounds; the trained cell measures itself.
    assert asked == [(), (), (), (), ("addition/1", "addition/3")]


def test_without_any_measurement_it_still_plans_the_focus():
    plan = curator().plan(Diagnosis(0, (), None, None))
    assert "addition/2 not measured" in plan.reason
    assert math.fsum(w for _, w in plan.mixture) == pytest.approx(1.0)


def test_gains_are_credited_once_and_to_the_latest_plan():
    c = curator()
    first = c.plan(diagnosis(*around(0.4)))
    assert c.decisions[0]["gain"] is None
    c.observe_gain(first, 0.1)
    assert c.decisions[0]["gain"] == 0.1
    arm = c.state_dict()["bandit"]["format:ok mastery:mid"]["study"]
    assert arm == {"pulls": 1, "value": pytest.approx(0.75)}
    with pytest.raises(ValueError, match="no gain is due"):
        c.observe_gain(first, 0.1)
    second = c.plan(diagnosis(*around(0.5), number=1))
    with pytest.raises(ValueError, match="no gain is due"):
        c.observe_gain(first, 0.1)
    with pytest.raises(ValueError, match="nan"):
        c.observe_gain(second, math.nan)
    assert c.decisions[1]["gain"] is None


def test_reward_is_monotone_and_bounded():
    assert [reward_of_gain(g) for g in (-1.0, -0.2, 0.0, 0.1, 0.2, 1.0)] == pytest.approx(
        [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"config.curator.focus: 'addition/9' is not a cell"):
        curator(focus=("addition/9",))
    with pytest.raises(UserError, match="twice"):
        curator(focus=("addition/1", "addition/1"))
    with pytest.raises(ValueError, match="1 generations"):
        ProceduralCurator(CuratorConfig(), CELLS, 1, 4)
    with pytest.raises(ValueError, match="'chess/1', which is not in the grid"):
        curator().plan(diagnosis(seen("chess/1", 0.5)))
    other = ProceduralCurator(CuratorConfig(), CELLS[:-1], 8, 4)
    with pytest.raises(ValueError, match=r"cells that differ: \['sorting/5'\]"):
        other.load_state_dict(curator().state_dict())


@st.composite
def cell_evidence(draw):
    groups = draw(st.integers(0, 8))
    n = 8 * groups
    value = draw(st.integers(0, n))
    counts = (draw(st.integers(0, value)), value, draw(st.integers(0, n)))
    cell = draw(st.sampled_from(CELLS))
    return CellEvidence(cell, n, *counts, groups, draw(st.integers(0, groups)))


rounds = st.lists(
    st.tuples(st.lists(cell_evidence(), max_size=6), st.floats(-0.5, 0.5)), min_size=1, max_size=5
)


@given(rounds, st.sampled_from([(), ("addition/2",), ("addition/1", "sorting/5")]))
def test_any_history_gives_lawful_plans_and_survives_json(history, focus):
    c, twin = curator(focus), curator(focus)
    for number, (evidence, gain) in enumerate(history):
        measured = diagnosis(*evidence, number=number)
        plan = c.plan(measured)
        assert twin.plan(measured) == plan
        assert plan.strategy in STRATEGIES
        assert math.fsum(w for _, w in plan.mixture) == pytest.approx(1.0)
        assert all(w > 0 and cell in CELLS for cell, w in plan.mixture)
        assert 0.0 <= plan.replay_fraction <= 1.0
        share = sum(w * informative_share(c.masteries[cell], 8) for cell, w in plan.mixture)
        assert plan.algorithm == "sft" or share >= 0.15 - 1e-9
        assert set(c.wanted_diagnosis()) <= set(CELLS)
        c.observe_gain(plan, gain)
        twin.observe_gain(plan, gain)
        reborn = curator(focus)
        reborn.load_state_dict(json.loads(json.dumps(twin.state_dict(), sort_keys=True)))
        assert reborn.state_dict() == c.state_dict()
        twin = reborn


def test_guarded_cells_are_diagnosed_first_and_share_the_drill():
    config = CuratorConfig(focus=("addition/2",), guard=("sorting/1",))
    c = ProceduralCurator(config, CELLS, num_generations=8, steps_per_round=4)
    assert "sorting/1" in c.wanted_diagnosis()
    plan = c.plan(diagnosis(*(seen(f"addition/{n}", 0.0, 0.9, 0.1) for n in (1, 2, 3))))
    assert plan.strategy == "format_drill"
    assert "sorting/1" in dict(plan.mixture)
    with pytest.raises(UserError, match="'nothing/1' is not a cell"):
        ProceduralCurator(CuratorConfig(guard=("nothing/1",)), CELLS, 8, 4)
