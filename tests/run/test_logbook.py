import json
from typing import ClassVar

import pytest
from fakes import make_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosr_jax.config import RunConfig
from cosr_jax.protocols import Curator
from cosr_jax.run.convergence import ConvergenceState, Measurement
from cosr_jax.run.logbook import Logbook, sample_metrics
from cosr_jax.run.metrics import NAMESPACES
from cosr_jax.run.report import Comparison, Proportion, RunReport, SuiteResult
from cosr_jax.run.state import LoopState, RoundTally
from cosr_jax.run.workdir import open_workdir
from cosr_jax.types import CATEGORIES, Completion, Outcome, Plan, RolloutGroup, Verdict

CONFIG = RunConfig()
PLAN = Plan("reinforce", "grpo", (("a/1", 0.75), ("b/2", 0.25)), 4, 0.125, 0.5, "c", "a/1 mixed")
STATS = {
    "by_domain": {"math": {"pass": 5, "timeout": 2}},
    "queue_peak": 9,
    "latency_p50_s": 0.25,
    "latency_p95_s": 0.5,
    "retries": 3,
    "errors": 0,
    "restarts": 1,
}
TIMING = {"rollout_s": 1.5, "step_s": 2.0}
PASSED = Verdict(Outcome.PASS, 1.0, answer="7", method="boxed", value_correct=True)
BARE = Verdict(Outcome.FAIL, 0.0, "no_answer", value_correct=True)
WRONG = Verdict(Outcome.FAIL, 0.25, "wrong_answer")
ERROR = Verdict(Outcome.ERROR, 1.0, value_correct=True)


def group(*verdicts, lengths=None, cut=0):
    lengths = lengths or [2] * len(verdicts)
    completions = tuple(
        Completion((1,) * n, (-1.0,) * n, f"text {n}", "length" if i < cut else "stop")
        for i, n in enumerate(lengths)
    )
    return RolloutGroup(make_task("a/1", 7), (1,), completions, verdicts)


class TalkativeCurator(Curator):
    rates: ClassVar = {"a/1": 0.5}

    def figures(self):
        return {"curator/llm/attempts": 2.0}

    def take_records(self):
        return [{"event": "call", "trail": ["a: stop"]}]

    def take_seconds(self):
        return 4.0, 1.0


def state_at(step, *scores, best=None):
    return LoopState(
        step=step,
        round=len(scores),
        tally=RoundTally(steps=3),
        convergence=ConvergenceState(scores=scores, best=best),
    )


@pytest.fixture
def files(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        yield workdir


def metrics_rows(files):
    return [json.loads(line) for line in (files.path / "metrics.jsonl").read_text().splitlines()]


def sample_rows(files):
    return [json.loads(line) for line in (files.samples / "train.jsonl").read_text().splitlines()]


def board(files):
    return EventAccumulator(str(files.tensorboard), size_guidance={"tensors": 0}).Reload()


def finished_report():
    suite = SuiteResult(
        name="held_out",
        sha256="0",
        strict=Comparison(Proportion(3, 4)),
        lenient=Comparison(Proportion(4, 4)),
        skills={},
        cells={},
        categories={},
        domains={},
        domain_categories={},
    )
    return RunReport("completed", "", 0, 9, 1, 1.0, 10, {}, "h", (suite,))


def test_sample_metrics_by_hand():
    groups = [
        group(PASSED, BARE, WRONG, ERROR, lengths=[1, 2, 3, 10], cut=1),
        group(BARE, BARE, lengths=[4, 4], cut=2),
    ]
    assert sample_metrics(groups) == {
        "reward/mean": 1.25 / 5,
        "reward/value_correct": 4 / 5,
        "reward/frac_reward_zero_std": 1 / 2,
        "completions/mean_length": 24 / 6,
        "completions/max_length": 10.0,
        "completions/clipped_ratio": 3 / 6,
        "verifier/error_rate": 1 / 6,
        "verifier/no_answer": 3 / 5,
        "verifier/wrong_answer": 1 / 5,
    }


def test_no_verdict_is_no_reward_of_zero():
    metrics = sample_metrics([group(ERROR, ERROR)])
    assert metrics["reward/mean"] is None
    assert metrics["reward/value_correct"] is None
    assert metrics["verifier/error_rate"] == 1.0


def test_shares_of_categories_have_names_of_their_own():
    groups = [group(*(Verdict(Outcome.FAIL, 0.0, name) for name in CATEGORIES))]
    metrics = sample_metrics(groups)
    assert {f"verifier/{name}" for name in CATEGORIES} < metrics.keys()
    assert metrics["verifier/error_rate"] == 0.0


def test_everything_is_written_under_its_namespace(files):
    groups = [group(PASSED, WRONG), group(ERROR, ERROR)]
    with Logbook(files, CONFIG, 0, {}) as book:
        book.plan(state_at(0, 0.25), PLAN, TalkativeCurator())
        row = book.step(state_at(1, 0.25), PLAN, groups, {"loss": 0.5, "kl": 0.0}, TIMING, STATS)
        best = Measurement(1, 0.5, 0.1)
        line = book.round(state_at(1, 0.25, 0.5, best=best), PLAN)
        book.finish(finished_report())
        book.sync()
        tags = board(files).Tags()
    for tag in tags["scalars"]:
        assert tag.split("/")[0] in NAMESPACES
    assert {
        *("train/loss", "train/kl", "reward/mean", "reward/frac_reward_zero_std"),
        *("completions/mean_length", "verifier/error_rate", "verifier/wrong_answer"),
        *("curriculum/replay_fraction", "curriculum/num_cells", "curriculum/mastery/a/1"),
        *("perf/rollout_s", "perf/step_s", "verifier/pool/latency_p95_s"),
        *("verifier/pool/queue_peak", "verifier/pool/retries", "verifier/pool/math/timeout"),
        *("curator/llm/attempts", "perf/curator_s", "perf/curator_busy_s", "perf/curator_hidden"),
        *("eval/validation", "eval/held_out", "eval/held_out_format_forgiven"),
    } <= set(tags["scalars"])
    record = json.loads((files.samples / "curator.jsonl").read_text())
    assert record == {"step": 0, "round": 2, "event": "call", "trail": ["a: stop"]}
    assert {"curriculum/mastery", "eval/learning_curves"} <= set(tags["images"])
    assert "completions/samples/text_summary" in tags["tensors"]
    assert row == {
        "step": 1,
        "strategy": "reinforce",
        "loss": 0.5,
        "reward": 1.25 / 2,
        "informative": 0.5,
        "entropy": None,
        "seconds": 2.0,
    }
    assert line == {
        "round": 2,
        "strategy": "reinforce",
        "cells": "a/1 b/2",
        "steps": 3,
        "validation": 0.5,
        "best": 0.5,
    }


def test_an_sft_step_has_no_samples_to_speak_of(files):
    with Logbook(files, CONFIG, 0, {}) as book:
        row = book.step(state_at(1, 0.25), PLAN, [], {"loss": 0.5}, TIMING, STATS)
        rows = book.sync()
    assert (row["reward"], row["informative"]) == (None, None)
    assert rows == {"metrics": 1, "samples": 0, "curator": 0}
    assert not any(name.startswith(("reward/", "completions/")) for name in metrics_rows(files)[0])


def test_every_completion_is_kept_with_its_verdict_and_provenance(files):
    with Logbook(files, CONFIG, 0, {}) as book:
        book.step(state_at(3, 0.25), PLAN, [group(PASSED, WRONG, ERROR)], {}, TIMING, STATS)
    rows = sample_rows(files)
    assert [row["reward"] for row in rows] == [1.0, 0.25, None]
    assert {row["step"] for row in rows} == {3}
    assert {row["round"] for row in rows} == {2}
    assert all("extractor" in row["provenance"] for row in rows)


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(files):
    def step(book, number, loss):
        state = state_at(number, 0.25)
        book.step(state, PLAN, [group(PASSED, WRONG)], {"loss": loss}, TIMING, STATS)

    with Logbook(files, CONFIG, 0, {}) as book:
        step(book, 1, 0.9)
        kept = book.sync()
        step(book, 2, 0.8)
        step(book, 3, 0.7)
    assert len(metrics_rows(files)) == 3
    with Logbook(files, CONFIG, 1, kept) as book:
        step(book, 2, 0.5)
        book.curves(state_at(2, 0.25, 0.75))
        assert book.sync() == {"metrics": 3, "samples": 4, "curator": 0}
    losses = [(r["step"], r["train/loss"]) for r in metrics_rows(files) if "train/loss" in r]
    assert losses == [(1, 0.9), (2, 0.5)]
    assert [row["step"] for row in sample_rows(files)] == [1, 1, 2, 2]
    shown = [(e.step, round(e.value, 3)) for e in board(files).Scalars("train/loss")]
    assert shown == [(1, 0.9), (2, 0.5)]
    assert [e.value for e in board(files).Scalars("eval/validation")] == [0.75]


def test_a_new_run_in_a_used_folder_starts_its_logs_anew(files):
    with Logbook(files, CONFIG, 0, {}) as book:
        book.step(state_at(1, 0.25), PLAN, [group(PASSED)], {"loss": 1.0}, TIMING, STATS)
    with Logbook(files, CONFIG, 0, {}) as book:
        assert book.sync() == {"metrics": 0, "samples": 0, "curator": 0}
    assert metrics_rows(files) == sample_rows(files) == []
