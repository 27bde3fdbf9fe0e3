"""Every config that we ship resolves, and says what a reader needs to know."""

import ast
from pathlib import Path

import pytest

from cosr_jax.config import parse_cells, parse_suites
from cosr_jax.config_args import load_config
from cosr_jax.tasks import make_source
from cosr_jax.tasks.probes import expand_cells

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
