"""The same input gets the same verdict, a hundred times, with more work at hand than cores."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CodeChecks, Completion, Outcome, Task
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.pool import VerifierPool
from cosr_jax.verifiers.sandbox import process

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

ADD = CodeChecks("add", ("assert add(2, 3) == 5", "assert add(-1, 1) == 0"))
DOUBLE = CodeChecks(io=(("4\n", "8\n"), ("5\n", "10\n")))

CASES = {
    ("code", "pass", ""): [
        (ADD, "def add(a, b):\n    return a + b"),
        (ADD, "import numpy as np\ndef add(a, b):\n    return int(np.add(a, b))"),
        (DOUBLE, "print(2 * int(input()))"),
    ],
    ("code", "fail", "wrong_answer"): [
        (ADD, "def add(a, b):\n    return a * b"),
        (DOUBLE, "print(8)"),
        (ADD, "class E:\n    def __eq__(s, o): return True\ndef add(a, b): return E()"),
    ],
    ("code", "fail", "runtime_error"): [(ADD, "def add(a, b):\n    return 1 / 0")],
    ("code", "fail", "syntax_error"): [(ADD, "```python\ndef add(a, b:\n    return 1\n```")],
    ("math", "pass", ""): [("12", r"\boxed{12}"), (r"\sqrt{8}", r"\boxed{2\sqrt{2}}")],
    ("math", "fail", "wrong_answer"): [("12", r"\boxed{13}"), (r"\sqrt{8}", r"\boxed{3\sqrt{2}}")],
    ("math", "fail", "no_answer"): [("12", "I give up")],
}


def cases(times):
    """Shuffled cases, each with its name and the verdict that it must get."""
    found = []
    for (domain, outcome, category), items in CASES.items():
        for n, (checks, text) in enumerate(items):
            is_code = isinstance(checks, CodeChecks)
            task = Task(
                domain,
                "s",
                0.0,
                "?",
                "" if is_code else checks,
                f"{domain} {category} {n}",
                checks=checks if is_code else None,
            )
            completion = Completion((), (), text, "stop")
            found += [((task, completion), (outcome, category))] * times
    random.Random(1).shuffle(found)
    return found


def judge(pool, times, limits=None):
    """The cases whose verdict was another one than it must be."""
    chosen = cases(times)
    verdicts = pool.judge([case for case, _ in chosen], limits)
    return [
        (case[0].key, verdict)
        for (case, expected), verdict in zip(chosen, verdicts, strict=True)
        if (verdict.outcome.value, verdict.category) != expected
    ]


@pytest.fixture
def pool():
    with VerifierPool(VerifierConfig(workers=4, wall_s=60.0)) as pool:
        yield pool


def test_ten_times(pool):
    assert judge(pool, 10) == []
    assert pool.stats()["errors"] == 0


@pytest.mark.slow
def test_a_hundred_times_while_the_machine_is_busy(pool):
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    spinners = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert judge(pool, 100) == []
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def test_an_endless_program_times_out_each_time(pool):
    task = Task("code", "s", 0.0, "?", "", "k", checks=ADD)
    endless = Completion((), (), "def add(a, b):\n    while True: pass", "stop")
    verdicts = pool.judge([(task, endless)] * 12, Limits(wall_s=0.3))
    assert {(v.outcome, v.category) for v in verdicts} == {(Outcome.FAIL, "timeout")}


@needs_proc
def test_servers_killed_while_at_work_cost_no_verdict(pool):
    """Whoever shares the machine may kill what it likes: verdicts are right, or there is none."""
    pool.judge([case for case, _ in cases(1)])
    stop = threading.Event()
    killed = []

    def kill_now_and_then():
        while not stop.wait(0.4):
            for pid in children(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        wrong = []
        deadline = time.monotonic() + 120
        while len(killed) < 4 and time.monotonic() < deadline:
            wrong += judge(pool, 5)
    finally:
        stop.set()
        thread.join()
    wrong += judge(pool, 1)  # the last one killed may be noticed only now
    assert killed
    assert [each for each in wrong if each[1].outcome is not Outcome.ERROR] == []
    assert judge(pool, 1) == []


@needs_proc
def test_a_hung_server_is_no_failure_of_its_programs(monkeypatch):
    monkeypatch.setattr(process, "_KILL_S", 2.0)
    with VerifierPool(VerifierConfig(workers=4, wall_s=5.0)) as pool:
        pool.judge([case for case, _ in cases(1)])
        servers = [pid for pid in descendants(os.getpid()) if "sandbox" in command_line(pid)]
        assert servers
        for pid in servers:
            os.kill(pid, signal.SIGSTOP)
        wrong = judge(pool, 2)
        assert [each for each in wrong if each[1].outcome is not Outcome.ERROR] == []
        assert judge(pool, 1, Limits(wall_s=60.0)) == []  # others have taken their places
    assert not [pid for pid in servers if "sandbox" in command_line(pid)]


def descendants(pid):
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
