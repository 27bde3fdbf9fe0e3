"""Every config that we ship resolves, and says what a reader needs to know."""

import ast
from pathlib import Path

import pytest

from cosr_jax.config import parse_cells, parse_suites
from cosr_jax.config_args import load_config
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.tasks import make_source
from cosr_jax.tasks.probes import expand_cells
from cosr_jax.types import CellEvidence, Diagnosis

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_resolves_and_its_cells_exist(path):
    config = load_config(str(path), [])
    source = make_source(config.tasks)
    suites = parse_suites(config.eval.test)
    suites["validation"] = parse_cells(config.eval.validation, "config.eval.validation")
    for cells in suites.values():
        assert sum(expand_cells(source, cells).values()) > 0  # raises for an unknown cell
    assert set(config.curator.focus) <= set(source.cells())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_opens_with_what_it_takes_and_the_command(path):
    story = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    command = f"cosr train --config={path.relative_to(ROOT).as_posix()}"
    for part in ("Reproduces:", "Takes:", "Expected:", command):
        assert part in story


def test_the_argument_changes_the_config():
    config = load_config(f"{ROOT}/configs/quickstart.py:seed=3,rounds=2", [])
    assert (config.seed, config.train.max_rounds) == (3, 2)


def test_sft_config_leaves_the_curator_no_grpo():
    cells = (*(f"addition/{n}" for n in (1, 2, 3)), "subtraction/1", "multiplication/1")
    # Half right and every group mixed: what GRPO is for.
    evidence = tuple(
        CellEvidence(c, samples=80, passed=40, value_correct=40, formatted=80)
        + CellEvidence(c, groups=10, informative_groups=10)
        for c in cells
    )
    algorithms = {}
    for name in ("quickstart", "sft"):
        config = load_config(f"{ROOT}/configs/{name}.py", [])
        curator = ProceduralCurator(config.curator, cells, num_generations=8, steps_per_round=4)
        plans = []
        for number in range(6):
            plans.append(curator.plan(Diagnosis(number, evidence, 0.5, 0.5)))
            curator.observe_gain(plans[-1], 0.0)
        algorithms[name] = {plan.algorithm for plan in plans}
    assert "grpo" in algorithms["quickstart"] and algorithms["sft"] == {"sft"}
