"""Whole runs on a tiny student: what they leave behind, how they end, and what they refuse."""

import collections
import dataclasses
import hashlib
import json
import math
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    SETTINGS,
    assert_same_run,
    metrics,
    report,
    saved_steps,
    tiny_config,
)
from tiny_student import WRONG, write_student

from cosr_jax.config import config_hash
from cosr_jax.curator import procedural
from cosr_jax.main import main
from cosr_jax.protocols import Curator
from cosr_jax.run import loop
from cosr_jax.run.evaluate import evaluate
from cosr_jax.run.rooms import open_rooms
from cosr_jax.run.workdir import open_workdir
from cosr_jax.types import CATEGORIES, Outcome, Plan, UserError, Verdict
from cosr_jax.verifiers.pool import VerifierPool


def samples(workdir):
    lines = (workdir / "samples/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


# --- an undisturbed run ---------------------------------------------------------------------------


def test_the_report_keeps_the_contract(unbroken, student):
    found = json.loads((unbroken / "report.json").read_text(encoding="utf-8"))
    assert found["schema"] == 1
    assert (found["status"], found["reason"]) == ("completed", "all 3 rounds are done")
    assert (found["seed"], found["steps"], found["rounds"]) == (SETTINGS["seed"], 9, 3)
    assert found["wall_s"] > 0 and found["generated_tokens"] > 0
    assert {"cosr_jax", "python", "jax", "flax"} <= found["versions"].keys()
    assert all(isinstance(version, str) for version in found["versions"].values())
    assert found["config_hash"] == config_hash(tiny_config(student))

    assert found["probes"].keys() == {"test"}
    suite = found["probes"]["test"]
    assert len(suite["sha256"]) == 64 and int(suite["sha256"], 16)
    assert suite["n"] == 16
    assert is_share(suite["before"]) and is_share(suite["after"])
    assert math.isclose(suite["gain"], suite["after"] - suite["before"])
    low, high = suite["gain_ci95"]
    assert -1 <= low <= suite["gain"] <= high <= 1
    assert suite["skills"].keys() == {"counting"}
    assert suite["skills"]["counting"] == {
        "n": 16,
        "before": suite["before"],
        "after": suite["after"],
    }
    assert suite["categories"].keys() <= set(CATEGORIES)
    assert sum(suite["categories"].values()) == round(16 * (1 - suite["after"]))

    assert [s["round"] for s in found["strategies"]] == [1, 2, 3]
    for decision in found["strategies"]:
        assert decision.keys() == {"round", "strategy", "context", "reason", "gain"}
        assert decision["strategy"] and decision["context"] and decision["reason"]
        assert -1 <= decision["gain"] <= 1
    assert found["strategies"][0]["strategy"] == "format_drill"

    best = found["best"]
    assert best.keys() == {"step", "score", "ci95"}
    scores = {row["step"]: row["eval/validation"] for row in metrics(unbroken) if _is_score(row)}
    assert best["score"] == max(scores.values()) == scores[best["step"]]
    low, high = best["ci95"]
    assert 0 <= low <= best["score"] <= high <= 1


def _is_score(row):
    return "eval/validation" in row


def test_gains_are_differences_of_validation_scores(unbroken):
    scores = [row["eval/validation"] for row in metrics(unbroken) if _is_score(row)]
    gains = [decision["gain"] for decision in report(unbroken)["strategies"]]
    assert gains == np.diff(scores).tolist()


def test_both_algorithms_ran_and_every_step_was_written(unbroken):
    rows = [row for row in metrics(unbroken) if "train/grad_norm" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(row["train/grad_norm"] > 0 and row["train/nonfinite_total"] == 0 for row in rows)
    by_grpo = [row for row in rows if "reward/mean" in row]
    assert 0 < len(by_grpo) < len(rows)
    assert {s["step"] for s in samples(unbroken)} == {row["step"] for row in by_grpo}
    for row in by_grpo:
        batch = [s for s in samples(unbroken) if s["step"] == row["step"]]
        assert len(batch) == 16 and {s["outcome"] for s in batch} == {"pass", "fail"}
        assert row["reward/mean"] == sum(s["reward"] for s in batch) / 16


def test_the_workdir_holds_what_it_should(unbroken):
    names = {path.name for path in unbroken.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "checkpoints",
        "tensorboard",
        "samples",
        "export",
        "metrics.jsonl",
        "report.json",
        "report.md",
    }
    assert list((unbroken / "tensorboard").glob("events.out.tfevents.*"))
    assert "# Run report: completed" in (unbroken / "report.md").read_text(encoding="utf-8")
    saved = saved_steps(unbroken)
    latest = sorted(saved)[-2:]
    assert latest[-1] == 9
    best = max(step for step, content in saved.items() if content["is_best"])
    assert best == report(unbroken)["best"]["step"]
    assert saved.keys() == {*latest, best}


def test_training_leaves_the_base_as_it_was(student, unbroken, here, tmp_path, monkeypatch):
    def digests(tree):
        return [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in jax.tree.leaves(tree)]

    def files():
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(student.iterdir())]

    seen = []
    finish_round = loop.Run.finish_round

    def watching(run, plan):
        finish_round(run, plan)
        seen.append((digests(run.rooms.student.base), digests(run.arrays.lora)))

    on_disk = files()
    monkeypatch.setattr(loop.Run, "finish_round", watching)
    config = tiny_config(student)
    with open_rooms(config) as rooms:
        base = digests(rooms.student.base)
    loop.train(config, tmp_path / "run")
    bases, adapters = zip(*seen, strict=True)
    assert bases == (base,) * 3
    assert len({tuple(lora) for lora in adapters}) == 3
    assert files() == on_disk
    assert_same_run(tmp_path / "run", unbroken)  # and a process of its own changes no bit


# --- the same workdir again -----------------------------------------------------------------------


@pytest.fixture
def copy(unbroken, tmp_path):
    """A copy of the finished run's workdir."""
    return shutil.copytree(unbroken, tmp_path / "copy")


def test_a_finished_run_started_again_is_done(copy, unbroken, student, here):
    again = loop.train(tiny_config(student), copy)
    assert (again.status, again.steps) == ("completed", 9)
    assert_same_run(copy, unbroken)


def test_a_changed_config_is_refused_by_its_keys_and_goes_on_when_allowed(copy, student, here):
    longer = tiny_config(student, train={"max_rounds": 4})
    with pytest.raises(UserError, match=r"config\.train\.max_rounds: 3 -> 4"):
        loop.train(longer, copy)
    assert report(copy)["rounds"] == 3
    again = loop.train(longer, copy, allow_config_change=True)
    assert (again.rounds, again.reason) == (4, "all 4 rounds are done")
    assert again.steps > 9


@pytest.mark.parametrize(
    "section",
    [{"eval": {"validation": "counting/1:12"}}, {"eval": {"test": ("other=counting/1:16",)}}],
)
def test_other_probes_do_not_continue_a_run(copy, student, here, section):
    with pytest.raises(UserError, match="measured on other tasks"):
        loop.train(tiny_config(student, **section), copy, allow_config_change=True)


def test_two_runs_never_share_a_workdir(student, tmp_path):
    config = tiny_config(student)
    with open_workdir(tmp_path / "run", config), pytest.raises(UserError, match="is in use by pid"):
        loop.train(config, tmp_path / "run")


def test_eval_measures_the_best_checkpoint_and_repeats_itself(copy, student, here):
    trained = (copy / "report.json").read_bytes()
    first, second = (evaluate(tiny_config(student), copy).to_json() for _ in range(2))
    clocks = [result.pop("wall_s") for result in (first, second)]
    assert all(clock > 0 for clock in clocks)
    assert first == second
    after = json.loads(trained)
    assert first["steps"] == after["best"]["step"]
    assert first["probes"]["test"]["after"] == after["probes"]["test"]["after"]
    assert first["probes"]["test"]["before"] is None
    assert (copy / "report.json").read_bytes() == trained


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stopped_has_the_signals_exit_code(
    number, code, student, tmp_path, monkeypatch
):
    config = tmp_path / "config.py"
    config.write_text(
        "from cosr_jax.config import default_config\ndef get_config(arg=''):\n"
        "    return default_config()\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: number)
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == code


# --- updates that are not finite ------------------------------------------------------------------


def test_one_bad_update_is_skipped_and_counted(student, here, tmp_path, monkeypatch):
    update, adapters = loop.Run.update, []

    def poisoned(run, plan, batch):
        rooms = run.rooms
        adapters.append(jax.tree.map(np.asarray, run.arrays.lora))
        if run.state.step == 1:
            base = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), rooms.student.base)
            run.rooms = dataclasses.replace(
                rooms, student=dataclasses.replace(rooms.student, base=base)
            )
        try:
            return update(run, plan, batch)
        finally:
            run.rooms = rooms

    monkeypatch.setattr(loop.Run, "update", poisoned)
    result = loop.train(tiny_config(student, train={"max_rounds": 1}), tmp_path / "run")
    assert (result.status, result.steps) == ("completed", 3)
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["train/nonfinite"] for row in rows] == [0, 1, 0]
    assert [row["train/nonfinite_total"] for row in rows] == [0, 1, 1]
    assert rows[1]["train/loss"] is None  # JSON has no NaN
    first, second, third = adapters
    jax.tree.map(np.testing.assert_array_equal, second, third)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first, second)
    assert any(jax.tree.leaves(moved))


def test_a_poisoned_learning_rate_stops_the_run_with_its_reason(student, here, tmp_path):
    config = tiny_config(
        student, train={"sft_learning_rate": 1e38, "steps_per_round": 9, "max_nonfinite": 2}
    )
    loop.train(config, tmp_path / "run")
    found = report(tmp_path / "run")
    assert found["status"] == "stopped"
    assert found["reason"].startswith("2 updates in a row were not finite")
    assert found["steps"] < 9 and found["rounds"] == 1
    assert found["best"]["step"] == 0
    assert found["probes"]["test"]["after"] == found["probes"]["test"]["before"]


# --- a verifier that cannot judge -----------------------------------------------------------------


class BrokenPool(VerifierPool):
    """Loses the verdict on every ``period``-th answer of the student to a task, from the first,
    while the period is not 0.
    """

    period = 0

    def judge(self, cases):
        verdicts = super().judge(cases)
        answers = [i for i, (_, completion) in enumerate(cases) if completion.token_ids]
        for i in answers[:: self.period] if self.period else []:  # worked solutions have no tokens
            verdicts[i] = Verdict(Outcome.ERROR, 0.0, detail="the worker died")
        return verdicts


@pytest.fixture
def broken(monkeypatch):
    """Makes verifiers break in the n-th call of a method of ``Run``; ``lasting``: and stay so."""

    def plan_the_accident(patch, method, call, period=1, lasting=True):
        original, calls = getattr(loop.Run, method), 0

        def breaking(run, *args):
            nonlocal calls
            calls += 1
            run.rooms.verifier.period = period if calls >= call else 0
            result = original(run, *args)
            run.rooms.verifier.period = period if calls >= call and lasting else 0
            return result

        patch.setattr("cosr_jax.run.rooms.VerifierPool", BrokenPool)
        patch.setattr(loop.Run, method, breaking)

    return plan_the_accident


def test_a_dead_verifier_is_no_score_of_zero(student, here, tmp_path, monkeypatch, broken):
    broken(monkeypatch, "measure_baseline", 1)
    with pytest.raises(UserError, match="could not judge 100% of the test tasks"):
        loop.train(tiny_config(student), tmp_path / "run")
    assert not saved_steps(tmp_path / "run")
    assert not (tmp_path / "run/report.json").exists()


@pytest.mark.parametrize(
    "method, call, what",
    [
        pytest.param(
            *("diagnose", 1, "100% of the samples for the diagnosis"), marks=pytest.mark.slow
        ),
        pytest.param(*("finish_round", 1, "100% of the validation tasks"), marks=pytest.mark.slow),
        ("practise", 2, "50% of the samples of the round"),
    ],
)
def test_a_verifier_that_dies_stops_the_run_and_a_sound_one_goes_on(
    method, call, what, student, unbroken, here, tmp_path, monkeypatch, broken
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken(patch, method, call)
        loop.train(tiny_config(student), workdir)
    found = report(workdir)
    assert found["status"] == "stopped"
    assert found["reason"].startswith(f"the verifier could not judge {what}")
    assert found["probes"]["test"]["n"] == 0 and found["probes"]["test"]["after"] is None
    assert found["probes"]["test"]["unjudged"] == 16
    assert found["strategies"][-1]["gain"] is None
    scores = [row["eval/validation"] for row in metrics(workdir) if _is_score(row)]
    assert len(scores) == 1 + found["rounds"]
    loop.train(tiny_config(student), workdir)
    assert_same_run(workdir, unbroken)


def test_a_few_lost_verdicts_are_masked(student, here, tmp_path, monkeypatch, broken):
    broken(monkeypatch, "practise", 1, period=4, lasting=False)
    config = tiny_config(student, verifier={"max_error_rate": 0.3})
    assert loop.train(config, tmp_path / "run").status == "completed"
    lost = [s for s in samples(tmp_path / "run") if s["outcome"] == "error"]
    assert len(lost) == len(samples(tmp_path / "run")) / 4 > 0
    assert all(s["reward"] is None and s["detail"] == "the worker died" for s in lost)
    rows = [row for row in metrics(tmp_path / "run") if "verifier/error_rate" in row]
    assert {row["verifier/error_rate"] for row in rows} == {0.25}


# --- no signal ------------------------------------------------------------------------------------


@pytest.fixture
def hopeless(tmp_path):
    """A student whose answers have the right form and never the right value."""
    return write_student(tmp_path / "hopeless", WRONG)


def test_without_signal_sft_is_chosen_and_the_run_ends_on_its_plateau(hopeless, here, tmp_path):
    config = tiny_config(
        hopeless,
        train={"sft_learning_rate": 1e-12, "max_rounds": 50, "steps_per_round": 1},
        convergence={"window": 4, "patience": 2},
    )
    loop.train(config, tmp_path / "run")
    found = report(tmp_path / "run")
    assert found["status"] in ("converged", "no_signal") and found["rounds"] < 10
    assert all("no signal" in decision["reason"] for decision in found["strategies"])
    assert all("SFT on verified samples" in decision["reason"] for decision in found["strategies"])
    assert not samples(tmp_path / "run")  # GRPO never ran
    assert found["probes"]["test"]["after"] == 0.0


def test_grpo_that_finds_no_informative_group_ends_with_no_signal(hopeless, here, tmp_path):
    config = tiny_config(
        hopeless,
        curator={"min_informative": 0.0},  # the gate stays open
        train={"sft_learning_rate": 1e-12, "max_rounds": 50, "steps_per_round": 2},
        convergence={"patience": 2},
    )
    loop.train(config, tmp_path / "run")
    found = report(tmp_path / "run")
    assert found["status"] == "no_signal" and found["rounds"] < 10
    assert "nothing to learn from" in found["reason"]
    rows = [row for row in metrics(tmp_path / "run") if "reward/mean" in row]
    assert len(rows) == 4 and all("train/loss" not in row for row in rows)


def test_grpo_without_signal_is_cut_short_and_gives_way_to_sft(
    hopeless, here, tmp_path, monkeypatch, capsys
):
    # A curator that hopes in vain for its first plan.
    monkeypatch.setattr(procedural.strategies, "informative_share", lambda *_: 0.9)
    monkeypatch.setattr(procedural.strategies, "_study", lambda _: None)
    plan_round = loop.Run.plan_round

    def planning(run):
        if run.state.round == 1:
            monkeypatch.undo()
        return plan_round(run)

    monkeypatch.setattr(loop.Run, "plan_round", planning)
    monkeypatch.setattr("cosr_jax.run.rooms.training_mesh", lambda config: None)
    config = tiny_config(hopeless, train={"max_rounds": 2, "steps_per_round": 5})
    loop.train(config, tmp_path / "run")
    assert "round 1 cut short: 0% of groups informative, under 15%" in capsys.readouterr().out
    assert max(s["step"] for s in samples(tmp_path / "run")) == 2
    first, second = report(tmp_path / "run")["strategies"]
    assert "GRPO" in first["reason"]
    assert "no signal" in second["reason"] and "SFT on verified samples" in second["reason"]


@pytest.mark.slow
def test_a_round_of_other_groups_costs_one_more_sampler_and_is_followed_by_the_usual_ones(
    student, here, tmp_path, monkeypatch
):
    class Sizes(Curator):
        """Groups of 8, of the usual 4, and of 8 again; all on one cell."""

        def __init__(self, config, cells):
            self.sizes = iter((8, 0, 8))

        def plan(self, diagnosis, lab):
            size = next(self.sizes)
            usual = Plan("reinforce", "grpo", (("counting/1", 1.0),), 1, 0.0, 1.0, "", "as it is")
            return dataclasses.replace(usual, group_size=size, kl_scale=2.0 if size else 1.0)

    schools, shapes, update = [], set(), loop.Run.update

    def noting(run, plan, batch):
        schools.append(run.school)
        shapes.add((batch.prompt_tokens.shape, batch.completion_tokens.shape))
        return update(run, plan, batch)

    monkeypatch.setattr(loop.Run, "update", noting)
    config = tiny_config(
        student,
        curator={"min_informative": 0.0},
        grpo={"kl_coef": 0.01},
        train={"max_rounds": 3, "steps_per_round": 1},
        convergence={"patience": 10},
    )
    loop.train(config, tmp_path / "run", make_curator=Sizes)
    counts = collections.Counter((s["step"], s["prompt"]) for s in samples(tmp_path / "run"))
    groups = [sorted(n for (at, _), n in counts.items() if at == step) for step in (1, 2, 3)]
    assert groups == [[8, 8], [4, 4, 4, 4], [8, 8]]  # 16 samples each, in the same batch shape
    rows = [row for row in metrics(tmp_path / "run") if "curriculum/group_size" in row]
    assert [row["curriculum/group_size"] for row in rows] == [8, 4, 8]
    assert [row["curriculum/kl_scale"] for row in rows] == [2.0, 1.0, 2.0]
    assert {rows for _, (rows, _) in shapes} == {16}
    # Lengths and the size of groups make programs, and nothing else: not a round, not a KL scale.
    assert schools[0].steps["grpo"].compilations == len(shapes)
