"""Programs of both kinds through the whole judge: nothing is bought, nothing honest is refused.

A layer that fails must not cost the machine anything: what the cheats attack are a directory, a
process and a port of the test's own, and what they use up is bounded without a sandbox, too.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CodeChecks, Completion, Task, UserError
from cosr_jax.verifiers.code import CodeJudge
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import layers

CORPUS = Path(__file__).parent / "corpus"
SECRET = "COSR_TEST_SECRET"
SECRET_VALUE = "3f1c9a77"
LAYERS = [layer.name for layer in layers.LAYERS]


def read_cases(name):
    return [json.loads(line) for line in (CORPUS / name).read_text(encoding="utf-8").splitlines()]


CHEATS, HONEST = read_cases("code_cheats.jsonl"), read_cases("code_honest.jsonl")


def task_of(case, replace):
    tests = case.get("tests") or ()
    checks = CodeChecks(
        entry_point=case["entry_point"] or "",
        tests=tuple(map(replace, [tests] if isinstance(tests, str) else tests)),
        io=tuple((pair["stdin"], pair["stdout"]) for pair in case.get("io", ())),
    )
    return Task("code", "corpus", 0.5, "", "", case["id"], checks=checks)


async def judge_all(layer, cases, replace=lambda text: text):
    """Verdicts by id, three cases at a time."""
    foreign = descendants()
    judge = CodeJudge(VerifierConfig(layer=layer))
    try:
        await judge.start()
    except UserError as error:
        pytest.skip(str(error))
    at_once = asyncio.Semaphore(3)
    verdicts = {}

    async def one(case):
        limits = Limits(**{"wall_s": 120.0, **case.get("limits", {})})
        completion = Completion((), (), replace(case["completion"]), "stop")
        async with at_once:
            verdicts[case["id"]] = await judge.judge(task_of(case, replace), completion, limits)

    try:
        for words in ("", "# numpy", "# asyncio"):  # starts the servers of every kind
            warm = {"id": "", "completion": f"def f(): {words}\n    return 1", "entry_point": "f"}
            await asyncio.gather(*(one({**warm, "tests": "assert f() == 1"}) for _ in range(3)))
        processes = descendants()
        await asyncio.gather(*map(one, cases))
        assert processes > foreign, "the search for survivors does not even find the servers"
        assert descendants() <= processes, "a case has left a process behind"
    finally:
        await judge.close()
    assert descendants() <= foreign, "a server has left a process behind"
    return verdicts


def disagreements(cases, verdicts):
    found = {}
    for case in cases:
        verdict = verdicts[case["id"]]
        is_as_expected = verdict.outcome.value == case["expect"]
        if not is_as_expected or case.get("category", verdict.category) != verdict.category:
            found[case["id"]] = (verdict.outcome.value, verdict.category, verdict.detail)
    return found


def descendants():
    """Every process below this one."""
    parents = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                stat = (directory / "stat").read_text().rpartition(")")[2].split()
                parents[int(directory.name)] = int(stat[1])

    def is_ours(pid):
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return {pid for pid in parents if pid != os.getpid() and is_ours(pid)}


class Listener:
    """A loopback server that nobody should reach."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.accepted = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            connection, _ = self._socket.accept()
            with connection:
                if connection.recv(16) == b"the end":
                    return
            self.accepted += 1

    def close(self):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.send(b"the end")
        self._thread.join()
        self._socket.close()


def test_the_corpus_is_large_enough_and_its_ids_are_unique():
    ids = [case["id"] for case in CHEATS] + [case["id"] for case in HONEST]
    assert len(CHEATS) >= 100 and len(HONEST) >= 100
    assert len(set(case["id"] for case in CHEATS)) == len(CHEATS)
    assert len(set(case["id"] for case in HONEST)) == len(HONEST)
    assert len(ids) >= 200


@pytest.mark.parametrize("layer", LAYERS)
def test_honest_programs_pass(layer):
    verdicts = asyncio.run(judge_all(layer, HONEST))
    assert not disagreements(HONEST, verdicts)


def check_cheats(layer, tmp_path, monkeypatch):
    monkeypatch.setenv(SECRET, SECRET_VALUE)
    tmp_path.chmod(0o777)
    canary = tmp_path / "canary"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes((CORPUS / "code_cheats.jsonl").read_bytes())
    corpus.chmod(0o666)
    victim = tmp_path / "victim"
    victim.mkdir()
    kept = victim / "kept"
    kept.write_text("kept")
    for path in (victim, kept):
        path.chmod(0o777)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    listener = Listener()
    values = {
        "{CANARY}": str(canary),
        "{CORPUS}": str(corpus),
        "{VICTIM}": str(victim),
        "{VICTIM_PID}": str(bystander.pid),
        "{PORT}": str(listener.port),
        "{SECRET}": SECRET,
        "{SECRET_VALUE}": SECRET_VALUE,
    }

    def replace(text):
        for name, value in values.items():
            text = text.replace(name, value)
        return text

    try:
        verdicts = asyncio.run(judge_all(layer, CHEATS, replace))
        assert bystander.poll() is None
    finally:
        listener.close()
        bystander.kill()
        bystander.wait()
    assert kept.read_text() == "kept" and victim.stat().st_mode & 0o777 == 0o777
    assert not disagreements(CHEATS, verdicts)
    assert not canary.exists()
    assert listener.accepted == 0


def test_cheats_fail_and_leave_nothing(tmp_path, monkeypatch):
    check_cheats("auto", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_cheats_fail_and_leave_nothing_in_every_layer(layer, tmp_path, monkeypatch):
    check_cheats(layer, tmp_path, monkeypatch)
