"""One place that writes what a run measures: TensorBoard, metrics.jsonl and samples/."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosr_jax.config import RunConfig, to_dict
from cosr_jax.protocols import Curator
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.checker import Checker
from cosr_jax.run.metrics import (
    JsonLinesLog,
    MetricsHistory,
    MetricsWriter,
    SampleLog,
    overlap,
    sample_rows,
)
from cosr_jax.run.report import RunReport
from cosr_jax.run.state import LoopState
from cosr_jax.run.workdir import Workdir
from cosr_jax.types import Outcome, Plan, RolloutGroup
from cosr_jax.verifiers.extraction import EXTRACTOR_VERSION

_PROVENANCE = f"extractor {EXTRACTOR_VERSION}"


class Logbook:
    """Writes into a workdir; a context manager.

    Args:
      files: the workdir.
      config: for the HParams page and the number of text samples.
      step: the step that the run starts or resumes from.
      rows: ``sync``'s value at that step; {} for a new run.
    """

    def __init__(self, files: Workdir, config: RunConfig, step: int, rows: Mapping[str, int]):
        self._config = config
        self._history = MetricsHistory(files.path / "metrics.jsonl", rows.get("metrics", 0))
        self._samples = SampleLog(files.samples / "train.jsonl", rows.get("samples", 0))
        self._calls = JsonLinesLog(files.samples / "curator.jsonl", rows.get("curator", 0))
        self._board = MetricsWriter(files.tensorboard, step)
        self._board.hparams(to_dict(config), ["eval/validation"])
        self._plan = ""

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: object) -> None:
        for log in (self._history, self._samples, self._calls, self._board):
            log.close()

    def sync(self) -> dict[str, int]:
        """Brings everything to the disk; what to keep of it when a run resumes from here."""
        self._board.flush()
        return {
            "metrics": self._history.sync(),
            "samples": self._samples.sync(),
            "curator": self._calls.sync(),
        }

    def plan(self, state: LoopState, plan: Plan, curator: Curator) -> None:
        """Notes the curator's decision and its picture of the student."""
        self._plan = f"{plan.strategy} ({plan.algorithm}): {plan.reason}"
        self._board.text_samples(state.step, [], self._plan)
        self.calls(state, curator)
        timing = overlap("curator", *curator.take_seconds())
        rates = curator.rates
        if rates:
            self._board.mastery_heatmap(state.step, rates)
        self._write(
            state.step,
            {
                "curriculum/replay_fraction": plan.replay_fraction,
                "curriculum/learning_rate_scale": plan.learning_rate_scale,
                "curriculum/kl_scale": plan.kl_scale,
                "curriculum/group_size": plan.group_size or self._config.rollout.num_generations,
                "curriculum/num_cells": len(plan.mixture),
                "curriculum/num_authored": len(plan.authored),
            }
            | {f"curriculum/mastery/{cell}": rate for cell, rate in rates.items()}
            | dict(curator.figures())
            | {f"perf/{name}": value for name, value in timing.items()},
        )

    def calls(self, state: LoopState, curator: Curator) -> None:
        """Notes what the curator has asked for the coming round since the last time."""
        for record in curator.take_records():
            self._calls.append({"step": state.step, "round": state.round + 1, **record})

    def opinions(self, state: LoopState, adviser: Checker | Adapter) -> None:
        """Notes the calls of an adviser, and its figures, if there were any calls."""
        records = adviser.take_records()
        for record in records:
            self._calls.append({"step": state.step, "round": state.round + 1, **record})
        if records:
            self._write(state.step, adviser.figures())

    def step(
        self,
        state: LoopState,
        plan: Plan,
        groups: Sequence[RolloutGroup],
        metrics: Mapping[str, float],
        timing: Mapping[str, float],
        verifier_stats: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes one step; returns the few figures worth a look while it runs."""
        values: dict[str, float | None] = {
            f"train/{name}": value for name, value in metrics.items()
        }
        values |= sample_metrics(groups) if groups else {}
        values |= {f"perf/{name}": value for name, value in timing.items()}
        values |= pool_metrics(verifier_stats)
        self._write(state.step, values)
        if groups:
            self._samples.record(state.step, state.round + 1, groups, _PROVENANCE)
            rows = sample_rows(groups, self._config.log.text_samples)
            self._board.text_samples(state.step, rows, self._plan)
        zero_std = values.get("reward/frac_reward_zero_std")
        return {
            "step": state.step,
            "strategy": plan.strategy,
            "loss": metrics.get("loss"),
            "reward": values.get("reward/mean"),
            "informative": None if zero_std is None else 1 - zero_std,
            "entropy": metrics.get("entropy"),
            "seconds": timing["step_s"],
        }

    def round(self, state: LoopState, plan: Plan) -> dict[str, Any]:
        """Writes a finished round; returns its line for the table of rounds."""
        self.curves(state)
        best = state.convergence.best
        return {
            "round": state.round,
            "strategy": plan.strategy,
            "cells": " ".join(cell for cell, _ in plan.mixture),
            "steps": state.tally.steps,
            "validation": state.score,
            "best": None if best is None else best.score,
        }

    def curves(self, state: LoopState) -> None:
        """Writes the latest validation accuracy and redraws the learning curve."""
        self._write(state.step, {"eval/validation": state.score})
        curve = self._history.curve("eval/validation")
        self._board.learning_curves(state.step, {"validation": curve})

    def finish(self, report: RunReport) -> None:
        """Writes the test suites' results at the best step, and closes the HParams session."""
        values: dict[str, float | None] = {}
        for suite in report.suites:
            values |= {
                f"eval/{suite.name}": suite.strict.after.rate,
                f"eval/{suite.name}_format_forgiven": suite.lenient.after.rate,
            }
        self._board.scalars(report.steps, values)
        self._board.finish()

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        self._history.record(step, values)
        self._board.scalars(step, values)


def pool_metrics(stats: Mapping[str, Any]) -> dict[str, float | None]:
    """The verifier's figures since the session's start, as it tells them (``VerifierPool.stats``).

    Counts of verdicts are by domain and category, e.g. verifier/pool/code/timeout.
    """
    names = ("queue_peak", "latency_p50_s", "latency_p95_s", "retries", "errors", "restarts")
    counts = {
        f"verifier/pool/{domain}/{category}": count
        for domain, categories in sorted(stats["by_domain"].items())
        for category, count in sorted(categories.items())
    }
    return {f"verifier/pool/{name}": stats[name] for name in names} | counts


def sample_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float | None]:
    """What a batch of judged groups says, under TRL's names where the meaning is the same.

    Means are over judged samples, and None when the verifier could judge none: that is no reward
    of zero.
    """
    completions = [c for group in groups for c in group.completions]
    verdicts = [v for group in groups for v in group.verdicts]
    judged = [v for v in verdicts if v.outcome is not Outcome.ERROR]
    lengths = np.array([len(c.token_ids) for c in completions])

    def share(count: float) -> float | None:
        return count / len(judged) if judged else None

    counts = collections.Counter(v.category for v in judged if v.category)
    counts["subjective"] = sum(v.is_subjective for v in judged)
    counts["left_out"] = sum(v.is_left_out for v in judged)
    counts["unanswered"] = sum(v.unanswered > 0 for v in judged)
    return {
        "reward/mean": share(sum(v.reward for v in judged)),
        "reward/value_correct": share(sum(v.value_correct for v in judged)),
        "reward/frac_reward_zero_std": sum(not g.is_informative for g in groups) / len(groups),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": sum(c.finish_reason == "length" for c in completions)
        / len(completions),
        "verifier/error_rate": (len(verdicts) - len(judged)) / len(verdicts),
    } | {f"verifier/{name}": share(count) for name, count in sorted(counts.items()) if count}
