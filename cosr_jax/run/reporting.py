"""Assembles reports from what a run holds."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from cosr_jax import __version__
from cosr_jax.config import RunConfig, config_hash
from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.run.report import (
    Best,
    Proportion,
    RunReport,
    SolvedExample,
    StrategyRecord,
    SuiteResult,
    next_commands,
)
from cosr_jax.run.rooms import School
from cosr_jax.run.state import LoopState
from cosr_jax.tasks.probes import ProbeSet

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "sympy")


def versions() -> dict[str, str]:
    """What the figures were made with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"cosr_jax": __version__, "python": platform.python_version(), **found}


def suite_result(
    config: RunConfig, probe: ProbeSet, before: ProbeResult | None, after: ProbeResult
) -> SuiteResult:
    """One probe set's result, with intervals as configured."""
    sides = {"adapted_before": before, "adapted": after}
    return SuiteResult.of(
        probe.name,
        probe.sha256,
        probe.tasks,
        before,
        after,
        config.eval.bootstrap,
        config.seed,
        {name: side.adapted_accuracy for name, side in sides.items() if side and side.adapted},
    )


def training_report(
    config: RunConfig,
    state: LoopState,
    school: School,
    after: Mapping[str, ProbeResult],
    wall_s: float,
    workdir: Path,
    arguments: tuple[str, ...],
    checklist: Mapping[str, float] | None = None,
) -> RunReport:
    """The report of a finished run.

    Args:
      config: of the run.
      state: at its end.
      school: its probes and curator.
      after: the best checkpoint's results, by test suite.
      wall_s: seconds, of all sessions.
      workdir: the run's folder.
      arguments: of the command line, for the next commands.
      checklist: figures of the pages' checker, if there is one.
    """
    best = state.convergence.best
    assert best is not None, "a finished run has been measured"
    n = len(school.validation.tasks)
    solved = (
        SolvedExample.find(p.name, p.tasks, state.before[p.name], after[p.name])
        for p in school.tests
    )
    return RunReport(
        status=state.status,  # type: ignore[arg-type]
        reason=state.reason,
        seed=config.seed,
        steps=state.step,
        rounds=state.round,
        wall_s=wall_s,
        generated_tokens=state.generated_tokens,
        versions=versions(),
        config_hash=config_hash(config),
        suites=tuple(
            suite_result(config, p, state.before[p.name], after[p.name]) for p in school.tests
        ),
        strategies=tuple(StrategyRecord(**decision) for decision in school.curator.decisions),
        best=Best(best.step, Proportion(round(best.score * n), n)),
        solved=next(filter(None, solved), None),
        chains=tuple(school.curator.chains),
        curator=school.curator.figures(),
        checklist=checklist or {},
        commands=next_commands(workdir, arguments),
    )


def evaluation_report(
    config: RunConfig,
    suites: tuple[SuiteResult, ...],
    wall_s: float,
    generated_tokens: int,
    step: int,
) -> RunReport:
    """The report of ``cosr eval``: "after" alone.

    Args:
      config: of the student.
      suites: measured.
      wall_s: seconds that it took.
      generated_tokens: of all answers.
      step: of the checkpoint measured; 0 for the base student.
    """
    return RunReport(
        status="completed",
        reason=f"measured step {step}" if step else "measured the student without adapters",
        seed=config.seed,
        steps=step,
        rounds=0,
        wall_s=wall_s,
        generated_tokens=generated_tokens,
        versions=versions(),
        config_hash=config_hash(config),
        suites=suites,
    )
