"""The closed loop with a language-model curator, offline: its answers are replayed."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import threading
import types
from pathlib import Path

import pytest
from llm_runs import NOWHERE, RECORDINGS, llm_settings, scripted
from openai_server import OpenAiServer
from tiny_runs import assert_same_run, finish, report, saved_steps, start, tiny_config

from cosr_jax.config import RunConfig, TrainConfig, from_config_dict
from cosr_jax.curator.llm import LlmCurator
from cosr_jax.protocols import Curator
from cosr_jax.run import loop
from cosr_jax.run.state import LoopState
from cosr_jax.types import AUTHORED

#: Bounds a failure; nothing that passes waits as long.
PATIENCE_S = 300

ROOT = Path(__file__).parents[2]


def replayed(student):
    return llm_settings(student, NOWHERE, mode="replay", folder=str(RECORDINGS))


@pytest.fixture(scope="module")
def replay(tmp_path_factory, student, program_cache):
    """The workdir of a replayed run."""
    workdir = tmp_path_factory.mktemp("llm") / "replay"
    finish(start(replayed(student), workdir, program_cache))
    return workdir


def rows_of(workdir, name):
    return [row for row in lines(workdir / "metrics.jsonl") if name in row]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_report_tells_a_chain_from_failure_to_gain(replay):
    found = report(replay)["curator"]
    assert [chain["round"] for chain in found["chains"]] == [1, 2, 3]
    assert [chain["fallback"] for chain in found["chains"]] == ["", "", ""]
    gains = [decision["gain"] for decision in report(replay)["strategies"]]
    assert [chain["gain"] for chain in found["chains"]] == gains
    chain = next(chain for chain in found["chains"] if chain["authored"])
    finding = chain["weakness"]
    assert finding["is_accepted"] and finding["p_value"] <= 0.05
    # The failure, the weakness and the tasks are those of the run itself.
    assert chain["failure"]["id"] in finding["weakness"]["evidence_task_ids"]
    trained = lines(replay / "samples/train.jsonl")
    practised = {s["prompt"] for s in trained if s["task"]["source"] == AUTHORED}
    assert practised and practised <= {task["prompt"] for task in chain["authored"]["kept"]}
    text = (replay / "report.md").read_text(encoding="utf-8")
    for part in (
        f"## From a failure to a gain (round {chain['round']})",
        chain["failure"]["prompt"],
        finding["reason"],
        chain["authored"]["kept"][0]["prompt"],
        f"changed by {chain['gain'] * 100:+.1f} percentage points",
        "| analyst | 3 |",
        "All calls together cost $0.00",
    ):
        assert part in text


def test_a_wrong_reference_of_the_authors_reached_no_training(replay):
    chain = next(c for c in report(replay)["curator"]["chains"] if c["authored"])
    assert chain["authored"]["refused"]["reference"] == 1
    figures = report(replay)["curator"]["figures"]
    assert figures["curator/llm/tasks_refused/reference"] == 1.0
    assert figures["curator/llm/tasks_written"] == 8.0


def test_calls_and_plans_are_logged(replay):
    records = lines(replay / "samples/curator.jsonl")
    plans = [record for record in records if record["event"] == "plan"]
    calls = [record for record in records if record["event"] == "call"]
    assert [plan["round"] for plan in plans] == [1, 2, 3]
    assert [call["role"] for call in calls[:3]] == ["analyst", "planner", "author"]
    assert all(call["from_cache"] and call["spent"]["prompt_tokens"] > 0 for call in calls)
    rows = rows_of(replay, "curator/llm/calls/analyst")
    assert [row["curator/llm/calls/analyst"] for row in rows] == [1.0, 2.0, 3.0]


def test_a_replayed_run_is_the_same_bit_for_bit(replay, student, here, tmp_path, monkeypatch):
    def no_network(self, address):
        raise AssertionError(f"a replay connects to {address}")

    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: (
            connect(self, address) if self.family == socket.AF_UNIX else no_network(self, address)
        ),
    )

    def but_for_what_was_asked_ahead(workdir):
        saved = saved_steps(workdir)
        host = saved[2]["host"]  # of the end of the first round
        assert bool(host["curator"].pop("client")["ahead"]) == (workdir == replay)
        del host["rows"]["curator"]
        return saved

    # Nor does it matter whether anything is asked while the student is measured.
    monkeypatch.setattr(LlmCurator, "asking_ahead", Curator.asking_ahead)
    loop.train(from_config_dict(replayed(student)), tmp_path / "again")
    assert_same_run(replay, tmp_path / "again", but_for_what_was_asked_ahead)
    logs = [w / "samples/curator.jsonl" for w in (replay, tmp_path / "again")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])  # later ones would change what is kept
def test_a_stopped_replay_goes_on_identically(
    step, replay, student, here, tmp_path, monkeypatch, capsys
):
    take_step = loop.Run.take_step

    def interrupted(run, plan):
        take_step(run, plan)
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    config = from_config_dict(replayed(student))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "take_step", interrupted)
        assert loop.train(config, tmp_path / "run") == signal.SIGTERM
    loop.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", replay)


@pytest.mark.slow
def test_a_server_killed_and_restarted_leaves_a_whole_run(student, here, tmp_path, monkeypatch):
    finish_round = loop.Run.finish_round
    # It is down when the second round is planned, which begins with the end of the first.
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(OpenAiServer(scripted))
        port = first.server_address[1]

        def before_the_end(run, plan):
            if run.state.round == 0:
                servers.close()
            elif run.state.round == 1:
                servers.enter_context(OpenAiServer(scripted, port=port))
            finish_round(run, plan)

        monkeypatch.setattr(loop.Run, "finish_round", before_the_end)
        llm = {"max_attempts": 1, "breaker_failures": 1, "breaker_cooldown_s": 0.01}
        values = llm_settings(student, first.url, **llm)
        loop.train(from_config_dict(values), tmp_path / "run")
    found = report(tmp_path / "run")
    assert (found["status"], found["rounds"]) == ("completed", 3)
    fallbacks = [chain["fallback"] for chain in found["curator"]["chains"]]
    assert fallbacks[0] == fallbacks[2] == "" and fallbacks[1]
    assert found["strategies"][1]["reason"].startswith("fallback to the procedural curator")
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert f"The procedural curator planned alone in 1 rounds: 2 ({fallbacks[1]})." in text
    calls = [r for r in lines(tmp_path / "run/samples/curator.jsonl") if r["event"] == "call"]
    assert [call["round"] for call in calls if "reason" in call] == [2]


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_failures_are_explained_while_the_student_is_measured(student, here, tmp_path, monkeypatch):
    """And a run that is killed after that does not ask again."""
    measuring, asked = threading.Event(), threading.Event()
    measure, plan_round = loop.Run.measure, loop.Run.plan_round
    roles = []

    def act(exchange):
        data = json.loads(exchange.body["messages"][1]["content"])["data"]
        roles.append("analyst" if "failures" in data else "other")
        if roles[-1] == "analyst" and roles.count("analyst") == 2:
            asked.set()
            assert measuring.wait(PATIENCE_S)
        scripted(exchange)

    def measured(run, probe):
        if run.state.step == 2 and run.state.round == 0:  # after the steps of the first round
            measuring.set()
            assert asked.wait(PATIENCE_S)
        return measure(run, probe)

    def killed(run):
        if run.state.round == 1:
            raise Killed
        return plan_round(run)

    monkeypatch.setattr(loop.Run, "measure", measured)
    with OpenAiServer(act) as server:
        values = llm_settings(student, server.url)
        values["train"] = {**values["train"], "max_rounds": 2}
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop.Run, "plan_round", killed)
            loop.train(from_config_dict(values), tmp_path / "run")
        assert roles.count("analyst") == 2
        loop.train(from_config_dict(values), tmp_path / "run")
    assert roles.count("analyst") == 2  # nor is it asked after the last round
    records = lines(tmp_path / "run/samples/curator.jsonl")
    calls = [(call["round"], call["role"]) for call in records if call["event"] == "call"]
    assert [number for number, role in calls if role == "analyst"] == [1, 2]
    assert len(calls) == len(roles)
    spent = [chain["spent"]["calls"] for chain in report(tmp_path / "run")["curator"]["chains"]]
    assert spent == [len([n for n, _ in calls if n == number]) for number in (1, 2)]


@pytest.mark.parametrize(
    ("change", "is_asked"),
    [
        ({}, True),
        ({"round": 2}, False),  # the third round of three is done
        ({"status": "stopped"}, False),
        ({"advisers": {"adapter": None}}, False),  # who would spend from the same budget meanwhile
    ],
)
def test_the_curator_asks_ahead_where_a_round_may_follow(change, is_asked):
    asked = []

    class Noting(Curator):
        def asking_ahead(self, round, evidence, failures):
            asked.append((round, evidence, failures))
            return super().asking_ahead(round, evidence, failures)

    change = dict(change)
    advisers = change.pop("advisers", {})
    run = types.SimpleNamespace(
        config=RunConfig(train=TrainConfig(max_rounds=3)),
        state=LoopState(**{"round": 1, "evidence": ["e"], "failures": ["f"], **change}),
        rooms=types.SimpleNamespace(advisers=advisers),
        school=types.SimpleNamespace(curator=Noting()),
    )
    with loop.Run.asking_ahead(run):
        pass
    assert asked == ([(3, ["e"], ["f"])] if is_asked else [])


def test_a_curator_of_ones_own_takes_thirty_lines_and_runs(student, here, tmp_path):
    path = ROOT / "docs/own_curator.py"
    spec = importlib.util.spec_from_file_location("own_curator", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    text = path.read_text(encoding="utf-8")
    body = text.partition("class WorstFirst")[2].partition("if __name__")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 30
    assert text.strip() in (ROOT / "docs/curator.md").read_text(encoding="utf-8")
    config = tiny_config(student, train={"max_rounds": 1, "steps_per_round": 1})
    found = loop.train(config, tmp_path / "own", make_curator=example.WorstFirst)
    assert (found.rounds, found.steps) == (1, 1)
