"""Worker processes that die, hang, lie, grow or are outlived by their work."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cosr_jax.verifiers import dispatch
from cosr_jax.verifiers.dispatch import COMMANDS, Answer, Workers

ROOTS = {"given": r"2\sqrt{2}", "gold": r"\sqrt{8}"}  # equal, which only a worker can tell

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def fake(tmp_path):
    """Makes a command that speaks the protocol and runs ``body`` on a request, knowing its
    ``life``: how many fakes were started before."""

    def make(body):
        script = tmp_path / "fake_worker.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import json, os, signal, sys, time
                lives = {str(tmp_path / "lives")!r}
                with open(lives, "a") as file:
                    file.write("x")
                life = os.path.getsize(lives) - 1
                def send(message):
                    print(json.dumps(message), flush=True)
                send({{"ready": True, "cpu_s": time.process_time(), "size_mb": 10}})
                for line in sys.stdin:
                    request = json.loads(line)
                    answer = {{
                        "id": request["id"], "result": {{"life": life}},
                        "cpu_s": time.process_time(), "size_mb": 10,
                    }}
                """
            )
            + textwrap.indent(textwrap.dedent(body), " " * 4)
        )
        return (sys.executable, "-S", str(script))

    return make


def ask(command, case=ROOTS, times=1, wall_s=30.0, count=1, **options):
    """The answers to ``times`` requests at once, and the number of restarts."""

    async def run():
        workers = Workers(count, commands={"compare": command}, **options)
        try:
            calls = [workers.ask("compare", case, wall_s) for _ in range(times)]
            return await asyncio.gather(*calls), workers.restarts
        finally:
            await workers.close()

    return asyncio.run(run())


def test_a_real_worker_answers():
    (answer,), restarts = ask(COMMANDS["compare"], wall_s=60.0)
    assert (answer.value, answer.limit) == ({"agree": True, "detail": ""}, "")
    assert answer.seconds > 0
    assert restarts == 0


def test_what_cannot_be_judged_is_nobodys_failure(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "from cosr_jax.verifiers.worker import Unjudgeable\n"
        "def f(case): raise Unjudgeable('odd gold') if case['n'] else ValueError('bug')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for n, detail in ((1, "odd gold"), (0, "ValueError: bug")):
        (answer,), restarts = ask(dispatch.worker_command("odd:f"), {"n": n}, wall_s=60.0)
        assert (answer.value, answer.limit, answer.detail, restarts) == (None, "", detail, 0)


def test_a_worker_killed_in_mid_request_is_no_answer_and_the_next_one_is(fake):
    body = "os.kill(os.getpid(), signal.SIGKILL) if life == 0 else send(answer)"
    (first, second), restarts = ask(fake(body), times=2)
    assert (first.value, first.limit) == (None, "")
    assert "worker ended" in first.detail
    assert second.value == {"life": 1}
    assert restarts == 1


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("sys.exit('out of luck')", "out of luck"),
        ("print('garbage', flush=True)", "garbage"),
        ("send([1])", "[1]"),
        ("send({'id': -1, 'result': {}})", "-1"),
        ("send({'id': request['id'], 'result': 1})", "result"),
        ("send({'id': request['id'], 'result': {}, 'cpu_s': 'x'})", "cpu_s"),
        ("sys.stdout.write('x' * (3 << 20)); sys.stdout.flush()", "without end"),
        ("send({'id': request['id'], 'error': 'gold is odd'})", "gold is odd"),
    ],
)
def test_what_is_no_answer_is_no_judgement(fake, body, detail):
    (answer,), _ = ask(fake(body))
    assert (answer.value, answer.limit) == (None, "")
    assert detail in answer.detail


def test_a_worker_that_sleeps_is_to_blame_itself(fake):
    (answer,), restarts = ask(fake("time.sleep(100)"), wall_s=0.3)
    assert (answer.value, answer.limit) == (None, "")
    assert 0.3 <= answer.seconds < 90
    assert restarts == 1


# Counts CPU time, not wall time, so that a busy machine cannot turn the computing into waiting.
SPIN = """
while time.process_time() < answer["cpu_s"] + 2.0:
    pass
"""


@needs_proc
def test_a_request_too_expensive_twice_is_a_judgement(fake):
    (answer,), restarts = ask(fake(SPIN), wall_s=0.4)
    # No judgement only where a crowded machine gave the worker hardly any CPU time.
    assert answer.limit == "timeout" or "of CPU time" in answer.detail
    assert answer.value is None
    assert restarts == (2 if answer.limit else restarts)


def test_a_request_too_expensive_once_is_answered_by_the_second_worker(fake, monkeypatch):
    monkeypatch.setattr(dispatch, "_COMPUTING_SHARE", 0.01)
    body = textwrap.indent(SPIN, " " * 4)
    (answer,), _ = ask(fake(f"if life == 0:\n{body}\nsend(answer)\n"), wall_s=1.0)
    assert answer.value == {"life": 1}


@needs_proc
def test_a_crowded_machine_gives_a_computing_worker_more_time(fake, monkeypatch):
    monkeypatch.setattr(dispatch, "_COMPUTING_SHARE", 3.0)  # as if it had a third of a core
    body = 'while time.process_time() < answer["cpu_s"] + 0.3: pass\nsend(answer)'
    (answer,), _ = ask(fake(body), wall_s=0.2)
    # Without an answer only where the machine is too crowded even for that.
    spent = answer.detail.rpartition("(")[2].partition(" ")[0]
    assert answer.value == {"life": 0} or float(spent) < 0.3


def test_running_out_of_memory_twice_is_a_judgement(fake):
    body = "send({'id': request['id'], 'limit': 'memory_limit'})"
    (answer,), restarts = ask(fake(body))
    assert (answer.value, answer.limit, restarts) == (None, "memory_limit", 2)


def test_a_memory_hungry_request_meets_its_limit(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text("def eat(case): return {'n': len(bytes(case['mb'] << 20))}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def run():
        workers = Workers(1, commands={"eat": dispatch.worker_command("hungry:eat")})
        try:
            sizes = (100, 300, 100)
            return [await workers.ask("eat", {"mb": mb}, 60.0, memory_mb=200) for mb in sizes]
        finally:
            await workers.close()

    fits, starves, again = asyncio.run(run())
    assert fits.value == again.value == {"n": 100 << 20}
    assert (starves.value, starves.limit) == (None, "memory_limit")


def test_what_earlier_requests_left_is_not_charged_to_the_next(tmp_path, monkeypatch):
    (tmp_path / "hoarder.py").write_text(
        "kept = []\ndef f(case): kept.append(bytes(150 << 20)); return {'n': len(kept)}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers, restarts = ask(dispatch.worker_command("hoarder:f"), times=5, wall_s=60.0)
    assert [answer.value["n"] for answer in answers] == [1, 2, 3, 4, 1]  # the fourth is too many
    assert restarts == 0


def test_workers_that_never_start_are_given_up_soon(fake):
    answers, _ = ask(("/nonexistent",), times=50, count=2)
    assert {answer.value for answer in answers} == {None}
    assert all("did not start" in answer.detail for answer in answers)
    lives = Path(fake("sys.exit()")[-1]).parent / "lives"
    ask((sys.executable, "-c", f"open({str(lives)!r}, 'a').write('x'); raise ImportError"), times=9)
    assert lives.stat().st_size == 3


def test_a_worker_that_dies_at_import_leaves_its_last_words():
    (answer,), _ = ask((sys.executable, "-c", "raise ImportError('no sympy here')"))
    assert answer.value is None
    assert "no sympy here" in answer.detail


def test_workers_retire_after_their_share_of_requests(fake):
    answers, restarts = ask(fake("send(answer)"), times=7, recycle_after=3)
    assert [answer.value["life"] for answer in answers] == [0, 0, 0, 1, 1, 1, 2]
    assert restarts == 0  # retirement is no failure


def test_workers_retire_when_they_have_grown(fake):
    body = "send({**answer, 'size_mb': 10 + 400 * request['id']})"
    answers, _ = ask(fake(body), times=4)
    assert [answer.value["life"] for answer in answers] == [0, 0, 1, 1]


def runs(pid):
    """Whether it is neither gone nor a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@needs_proc
def test_a_worker_killed_while_idle_is_replaced_unnoticed(fake):
    async def run():
        workers = Workers(
            1, commands={"compare": fake("send({**answer, 'result': {'pid': os.getpid()}})")}
        )
        pids = []
        for _ in range(3):
            answer = await workers.ask("compare", ROOTS, 30.0)
            pids.append(answer.value["pid"])
            os.kill(pids[-1], signal.SIGKILL)
            while runs(pids[-1]):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
        await workers.close()
        return pids, workers.restarts

    pids, restarts = asyncio.run(run())
    assert len(set(pids)) == 3
    assert restarts == 2


def test_a_caller_who_waits_no_more_leaves_no_worker_busy(fake, tmp_path):
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(1000)"

    async def run():
        workers = Workers(1, commands={"compare": fake(body)})
        caller = asyncio.ensure_future(workers.ask("compare", ROOTS, 500.0))
        while not (pid.exists() and pid.read_text().endswith(".")):
            await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await workers.close()

    asyncio.run(run())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()[:-1]), 0)


def test_closed_workers_answer_nothing(fake):
    async def run():
        workers = Workers(1, commands={"compare": fake("send(answer)")})
        await workers.ask("compare", ROOTS, 30.0)
        await workers.close()
        return await workers.ask("compare", ROOTS, 30.0)

    answer = asyncio.run(run())
    assert answer == Answer(None, detail="the workers are closed", seconds=answer.seconds)


def test_nothing_of_the_environment_but_paths_reaches_a_worker(fake, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    body = "send({**answer, 'result': {'names': sorted(os.environ)}})"
    (answer,), _ = ask(fake(body))
    assert {"PATH", "PYTHONPATH"} <= set(answer.value["names"])
    assert "SECRET" not in answer.value["names"]


def test_the_worker_ends_with_its_input_even_while_busy(tmp_path):
    (tmp_path / "busy.py").write_text("def f(case):\n    while True: pass")
    with subprocess.Popen(
        dispatch.worker_command("busy:f"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as worker:
        assert json.loads(worker.stdout.readline())["ready"] is True
        worker.stdin.write(b'{"id": 1, "memory_mb": 512, "case": {}}\n')
        worker.stdin.flush()
        time.sleep(0.1)
        worker.stdin.close()
        assert worker.wait(timeout=240) == 0
        assert worker.stdout.read() == b"", "it was still busy"


def test_nothing_printed_by_a_library_reaches_the_protocol(tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(
        "import os\nprint('import')\n"
        "def f(case): print('call', flush=True); os.write(1, b'raw'); return {}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (answer,), _ = ask(dispatch.worker_command("noisy:f"))
    assert answer.value == {}


def test_requests_share_the_workers(fake, tmp_path):
    together = tmp_path / "together"
    together.mkdir()
    body = (
        f"open(f'{together}/{{os.getpid()}}', 'w').close()\n"
        f"while len(os.listdir('{together}')) < 3: time.sleep(0.01)\n"  # three are at work at once
        "send(answer)"
    )
    answers, _ = ask(fake(body), times=6, count=3, wall_s=240.0)
    assert len(answers) == 6
    assert len(list(together.iterdir())) == 3
