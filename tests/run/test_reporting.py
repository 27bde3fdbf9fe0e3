import dataclasses
import importlib.metadata
import json
import types

import pytest
from fakes import make_task

from cosr_jax.config import CuratorConfig, EvalConfig, RunConfig, config_hash
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.run.convergence import ConvergenceState, Measurement
from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.run.report import write_report
from cosr_jax.run.reporting import evaluation_report, suite_result, training_report, versions
from cosr_jax.run.state import LoopState
from cosr_jax.run.statistics import paired_bootstrap, wilson_interval
from cosr_jax.tasks.probes import ProbeSet, tasks_sha256
from cosr_jax.types import CellEvidence, Diagnosis

CONFIG = RunConfig(seed=3)
CELLS = ("addition/1", "addition/2")


def probe(name, count):
    tasks = tuple(make_task(CELLS[i % 2], i) for i in range(count))
    return ProbeSet(name, tasks, tasks_sha256(tasks))


def result(strict, lenient=None, judged=None):
    """A measurement from strings of 1 and 0, one digit per task."""
    passed = tuple(c == "1" for c in strict)
    return ProbeResult(
        judged=tuple(c == "1" for c in judged or "1" * len(strict)),
        strict=passed,
        lenient=tuple(c == "1" for c in lenient or strict),
        categories=tuple("" if p else "wrong_answer" for p in passed),
        answers=tuple(f"answer {i}" for i in range(len(strict))),
        generated_tokens=10,
    )


def decided_curator():
    """A real one after two rounds, the second not yet measured."""
    curator = ProceduralCurator(CuratorConfig(), CELLS, 4, 2)
    evidence = tuple(CellEvidence(cell, 16, 8, 8, 16, 4, 4) for cell in CELLS)
    curator.observe_gain(curator.plan(Diagnosis(1, evidence, 0.25, 0.25)), 0.25)
    curator.plan(Diagnosis(2, evidence, 0.5, 0.5))
    return curator


@pytest.fixture
def report():
    tests = (probe("held_out", 6), probe("easy", 2))
    school = types.SimpleNamespace(
        validation=probe("validation", 8), tests=tests, curator=decided_curator()
    )
    state = LoopState(
        step=7,
        round=2,
        convergence=ConvergenceState(
            scores=(0.25, 0.5), standard_errors=(0.1, 0.1), best=Measurement(5, 0.5, 0.1)
        ),
        before={
            "held_out": result("000011", "100011", judged="111110"),
            "easy": result("11"),
        },
        generated_tokens=1234,
        status="converged",
        reason="plateau: flat",
    )
    after = {"held_out": result("110101"), "easy": result("11")}
    return training_report(
        CONFIG, state, school, after, 12.5, "runs/here", ("--config=configs/quickstart.py",)
    )


def test_report_json_keeps_the_contract(tmp_path, report):
    write_report(tmp_path, report)
    content = json.loads((tmp_path / "report.json").read_text())
    head = {
        "schema": 1,
        "status": "converged",
        "reason": "plateau: flat",
        "seed": 3,
        "steps": 7,
        "rounds": 2,
        "wall_s": 12.5,
        "generated_tokens": 1234,
        "config_hash": config_hash(CONFIG),
    }
    assert head.items() <= content.items()
    assert content["versions"] == versions()
    assert content["best"] == {"step": 5, "score": 0.5, "ci95": list(wilson_interval(4, 8))}
    held_out, easy = (content["probes"][name] for name in ("held_out", "easy"))
    assert held_out["sha256"] == probe("held_out", 6).sha256
    # Of six tasks the last one was not judged before training.
    assert (held_out["n"], held_out["unjudged"]) == (5, 1)
    assert (held_out["before"], held_out["after"]) == (1 / 5, 3 / 5)
    assert held_out["gain"] == pytest.approx(2 / 5)
    low, high = held_out["gain_ci95"]
    assert -1 <= low <= held_out["gain"] <= high <= 1
    assert held_out["skills"] == {"addition": {"n": 5, "before": 1 / 5, "after": 3 / 5}}
    assert held_out["categories"] == {"wrong_answer": 2}
    assert (easy["before"], easy["after"], easy["gain"]) == (1.0, 1.0, 0.0)


def test_the_curators_decisions_are_told_as_they_are(tmp_path, report):
    decisions = decided_curator().decisions
    assert report.to_json()["strategies"] == decisions
    assert [decision["gain"] for decision in decisions] == [0.25, None]


def test_a_solved_failure_and_the_next_commands_are_shown(report):
    # Task 1: its value was wrong before; task 0's only lacked its form.
    assert report.solved.prompt == make_task("addition/2", 1).prompt
    commands = dict(report.commands)
    assert commands["watch the curves"] == "tensorboard --logdir runs/here/tensorboard"
    assert "cosr train --config=configs/quickstart.py" in commands.values()


def test_a_run_that_was_never_measured_has_no_report():
    school = types.SimpleNamespace(validation=probe("validation", 8), tests=())
    with pytest.raises(AssertionError, match="has been measured"):
        training_report(CONFIG, LoopState(), school, {}, 0.0, "runs/here", ())


def test_an_evaluation_tells_after_alone(tmp_path):
    suite = suite_result(CONFIG, probe("suite", 4), None, result("1100"))
    report = evaluation_report(CONFIG, (suite,), 1.0, 40, step=7)
    write_report(tmp_path, report)
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["status"], content["reason"]) == ("completed", "measured step 7")
    entry = content["probes"]["suite"]
    assert (entry["after"], entry["before"], entry["gain"]) == (0.5, None, None)
    assert entry["gain_ci95"] is None
    assert (content["best"], content["strategies"], content["rounds"]) == (None, [], 0)
    base = evaluation_report(CONFIG, (suite,), 1.0, 40, step=0)
    assert base.reason == "measured the student without adapters"


def test_intervals_use_the_configured_resamples_and_seed():
    config = dataclasses.replace(CONFIG, seed=11, eval=EvalConfig(bootstrap=123))
    before, after = result("00100101"), result("11010110")
    suite = suite_result(config, probe("suite", 8), before, after)
    assert suite.strict.gain == paired_bootstrap(before.strict, after.strict, 123, 11)


def test_versions_name_what_computes():
    found = versions()
    assert {"cosr_jax", "python", "jax", "flax", "optax", "transformers"} <= found.keys()
    assert found["jax"] == importlib.metadata.version("jax")
