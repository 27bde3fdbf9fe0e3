"""``cosr eval``: a student, trained or not, measured on probes or on a task file."""

from __future__ import annotations

import json
import time
from pathlib import Path

from cosr_jax.config import RunConfig
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.evaluation import measure
from cosr_jax.run.manifest import replace_file
from cosr_jax.run.progress import Progress
from cosr_jax.run.report import RunReport, SuiteResult, render_terminal, write_report
from cosr_jax.run.reporting import evaluation_report, suite_result
from cosr_jax.run.rooms import copy_state, make_probes, open_rooms
from cosr_jax.run.workdir import read_config
from cosr_jax.tasks import make_source
from cosr_jax.tasks.files import parse_fields, read_tasks
from cosr_jax.tasks.probes import ProbeSet, tasks_sha256
from cosr_jax.train.step import init_state


def evaluate(config: RunConfig, workdir: Path | None) -> RunReport:
    """Measures greedy pass@1 and prints it.

    Args:
      config: ``config.eval.suite_file`` names a task file; without one the test suites are
        measured.
      workdir: a run's folder: its best checkpoint is measured, and the results join its
        report.json, whose training figures stay.  A folder without a run: the base student is
        measured and the report written there.  None: the base student, printed only.

    Raises:
      UserError: a setting, file or checkpoint cannot be used.
    """
    started = time.monotonic()
    is_trained = workdir is not None and (workdir / "checkpoints").is_dir()
    if is_trained and workdir is not None:
        read_config(workdir)  # a damaged run is named before the student is loaded
    probes = _probes(config)
    step = tokens = 0
    results: list[SuiteResult] = []
    with Progress() as progress, open_rooms(config, progress.phase) as rooms:
        if is_trained and workdir is not None:
            with CheckpointStore(workdir / "checkpoints", config.checkpoint.keep) as store:
                template = init_state(copy_state(rooms.student.lora), config.train, rooms.mesh)
                restored = store.restore(template, store.best_step())
            step = restored.step
            rooms.engine.set_adapters(restored.arrays.lora)
        for probe in probes:
            progress.phase(f"measuring {probe.name} ({len(probe.tasks)} tasks)")
            result = measure(
                probe.tasks,
                rooms.engine,
                rooms.chat,
                rooms.verifier,
                config.eval.max_new_tokens,
                rooms.adapter,
            )
            tokens += result.generated_tokens
            results.append(suite_result(config, probe, None, result))
        if workdir is not None and rooms.adapter is not None:
            keep_adaptations(workdir / "samples/adapted.jsonl", rooms.adapter)
    report = evaluation_report(config, tuple(results), time.monotonic() - started, tokens, step)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_trained:
            _join(workdir / "report.json", report)
        else:
            write_report(workdir, report)
    render_terminal(report)
    return report


def keep_adaptations(path: Path, adapter: Adapter) -> None:
    """Writes what the adapter looked at, with both verdicts, as JSON lines."""
    records = [r for r in adapter.take_records() if r["event"] == "adaptation"]
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(line + "\n" for line in lines))


def _probes(config: RunConfig) -> tuple[ProbeSet, ...]:
    if config.eval.suite_file:
        path = Path(config.eval.suite_file)
        tasks = read_tasks(path, parse_fields(config.eval.fields))
        return (ProbeSet(path.stem, tasks, tasks_sha256(tasks)),)
    _, tests = make_probes(config, make_source(config.tasks))
    return tests


def _join(path: Path, report: RunReport) -> None:
    """Adds the measured suites to a run's report; what training wrote of the same stays."""
    content = report.to_json()
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in content["probes"].items():
            old = known["probes"].get(name)
            if old is None or (old["sha256"], old["after"]) != (entry["sha256"], entry["after"]):
                known["probes"][name] = entry
        content = known
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
