"""Verdicts, and what happens when workers die, hang, lie or are outlived by their work."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Outcome, Task, UserError
from cosr_jax.verifiers.pool import WORKER_COMMAND, VerifierPool

ROOT = r"2\sqrt{2}"  # equals sqrt(8), which only a worker can tell


def task(answer, prompt="?"):
    return Task("math", "skill", 0.0, prompt, answer, f"key:{answer}")


def says(text, finish_reason="stop"):
    return Completion((), (), text, finish_reason)


def case(answer, gold, prompt="?"):
    return task(gold, prompt), says(rf"\boxed{{{answer}}}")


def fake_worker(tmp_path, body):
    """A command that speaks the protocol and runs ``body`` on a case, knowing its ``life``: how
    many fakes were started before."""
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
            send({{"ready": True, "cpu_s": time.process_time()}})
            for line in sys.stdin:
                case = json.loads(line)
                answer = {{"id": case["id"], "agree": True, "cpu_s": time.process_time()}}
            """
        )
        + textwrap.indent(textwrap.dedent(body), " " * 4)
    )
    return (sys.executable, "-S", str(script))


def judge_once(tmp_path, body, **config):
    config = VerifierConfig(workers=1, **{"wall_s": 30.0, **config})
    with VerifierPool(config, fake_worker(tmp_path, body)) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
        return verdict, pool.stats()


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(VerifierConfig(workers=2, wall_s=60.0)) as pool:
        yield pool


def test_a_right_boxed_value_passes(pool):
    (verdict,) = pool.judge([case("19", "19")])
    assert (verdict.outcome, verdict.reward, verdict.category) == (Outcome.PASS, 1.0, "")
    assert (verdict.answer, verdict.method, verdict.value_correct) == ("19", "boxed", True)


@pytest.mark.parametrize(
    ("completion", "category", "value_correct"),
    [
        (says(r"\boxed{18}"), "wrong_answer", False),
        (says("The answer is 19."), "no_answer", True),
        (says("12 + 7 = 19"), "no_answer", True),
        (says("12 + 7 = 18"), "no_answer", False),
        (says("12 + 7 = 19, so", "length"), "truncated", True),
        (says(r"\boxed{19", "length"), "truncated", False),
        (says(r"\boxed{19"), "no_answer", False),
        (says(r"<think>\boxed{19}</think>"), "no_answer", False),
        (says(r"\boxed{19 or 18}"), "no_answer", False),
        (says(r"\boxed{12+7}"), "wrong_answer", False),
        (says(""), "no_answer", False),
    ],
)
def test_failures_have_one_category(pool, completion, category, value_correct):
    (verdict,) = pool.judge([(task("19"), completion)])
    assert verdict.outcome is Outcome.FAIL
    assert (verdict.reward, verdict.category) == (0.0, category)
    assert verdict.value_correct is value_correct


def test_the_form_of_a_right_value_is_named(pool):
    (verdict,) = pool.judge([(task("19"), says("The answer is 19."))])
    assert "right value in the form 'phrase'" in verdict.detail


def test_accepted_forms_are_configured():
    with VerifierPool(VerifierConfig(accept=("phrase", "number"))) as lenient:
        verdicts = lenient.judge([(task("19"), says(t)) for t in ("It is 19 now", r"\boxed{19}")])
    assert [v.outcome for v in verdicts] == [Outcome.PASS, Outcome.FAIL]


@pytest.mark.parametrize("accept", [(), ("boxed", "boxd")])
def test_unknown_forms_are_refused(accept):
    with pytest.raises(UserError, match=r"config\.verifier\.accept.*boxed, answer_tag"):
        VerifierPool(VerifierConfig(accept=accept))


def test_other_domains_are_refused(pool):
    code = Task("code", "skill", 0.0, "?", "", "key:f")
    with pytest.raises(UserError, match="'key:f' has domain 'code'"):
        pool.judge([(code, says("x"))])


def test_copying_the_question_does_not_pass(pool):
    (verdict,) = pool.judge([case("84/7", "12", "What is 84 / 7?")])
    assert (verdict.category, verdict.detail) == ("wrong_answer", "restates the question")


def test_order_is_kept_and_repeats_agree(pool):
    cases = [
        case(ROOT, r"\sqrt{8}"),
        case("5", "5"),
        case(r"3\sqrt{2}", r"\sqrt{8}"),
        case("x^2+2x+1", "(x+1)^2"),
        case("", "1"),
        case(r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ]
    verdicts = pool.judge(cases * 100)
    judged = [(v.outcome, v.reward, v.category) for v in verdicts]
    assert judged == judged[: len(cases)] * 100
    assert [v.reward for v in verdicts[: len(cases)]] == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_exact_comparison_starts_no_worker():
    with VerifierPool(VerifierConfig(), ("/nonexistent",)) as pool:
        assert all(v.reward for v in pool.judge([case("1/2", "0.5")] * 1000))
        stats = pool.stats()
        assert stats["verdicts"] == {"pass": 1000}
        assert 0.0 < stats["latency_p50_s"] <= stats["latency_p95_s"] < 0.1


def test_a_worker_killed_in_mid_case_costs_nothing(tmp_path):
    verdict, stats = judge_once(
        tmp_path,
        """
        if life == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        send(answer)
        """,
    )
    assert verdict.outcome is Outcome.PASS
    assert (stats["retries"], stats["restarts"], stats["errors"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("sys.exit('out of luck')", "out of luck"),
        ("print('garbage', flush=True)", "garbage"),
        ("send([1])", "[1]"),
        ("send({'id': -1, 'agree': True})", "-1"),
        ("send({'id': case['id'], 'agree': 1})", "agree"),
        ("send({'id': case['id'], 'agree': True, 'cpu_s': 'x'})", "cpu_s"),
        ("sys.stdout.write(2 * (json.dumps(answer) + chr(10))); sys.stdout.flush()", "agree"),
        ("sys.stdout.write('x' * (1 << 20)); sys.stdout.flush()", "without end"),
        ("send({'id': case['id'], 'error': 'gold is odd'})", "gold is odd"),
    ],
)
def test_a_worker_that_fails_twice_is_no_judgement(tmp_path, body, detail):
    verdict, stats = judge_once(tmp_path, body)
    assert (verdict.outcome, verdict.category) == (Outcome.ERROR, "")
    assert detail in verdict.detail
    assert (stats["retries"], stats["errors"]) == (1, 1)


def test_a_worker_that_sleeps_is_to_blame_itself(tmp_path):
    verdict, stats = judge_once(tmp_path, "time.sleep(100)", wall_s=0.3)
    assert verdict.outcome is Outcome.ERROR
    assert verdict.seconds >= 0.6
    assert stats["restarts"] == 2


# Counts CPU time, not wall time, so that a busy machine cannot turn the computing into waiting.
SPIN = """
while time.process_time() < answer["cpu_s"] + 2.0:
    pass
"""


def test_an_answer_too_expensive_twice_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("cosr_jax.verifiers.dispatch._COMPUTING_SHARE", 0.01)
    verdict, stats = judge_once(tmp_path, SPIN, wall_s=0.5)
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, "timeout")
    assert (verdict.reward, stats["retries"]) == (0.0, 1)


def test_an_answer_too_expensive_once_is_judged_by_the_second_worker(tmp_path):
    body = textwrap.indent(SPIN, " " * 4)
    verdict, _ = judge_once(tmp_path, f"if life == 0:\n{body}\nsend(answer)\n", wall_s=0.5)
    assert verdict.outcome is Outcome.PASS


def test_running_out_of_memory_twice_fails(tmp_path):
    verdict, _ = judge_once(tmp_path, "send({'id': case['id'], 'limit': 'memory_limit'})")
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, "memory_limit")


def test_workers_that_never_start_are_given_up_soon():
    with VerifierPool(VerifierConfig(workers=2), ("/nonexistent",)) as pool:
        verdicts = pool.judge([case(ROOT, r"\sqrt{8}"), case("5", "5")] * 50)
    assert [v.outcome for v in verdicts] == [Outcome.ERROR, Outcome.PASS] * 50
    assert "did not start" in verdicts[0].detail


def test_a_worker_that_dies_at_import_leaves_its_last_words():
    command = (sys.executable, "-c", "raise ImportError('no sympy here')")
    with VerifierPool(VerifierConfig(workers=1), command) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
    assert verdict.outcome is Outcome.ERROR
    assert "no sympy here" in verdict.detail


def descendants():
    """Pids of this process's live children, from /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_close_leaves_no_process_behind():
    before = descendants()
    pool = VerifierPool(VerifierConfig(workers=2, wall_s=60.0))
    pool.judge([case(ROOT, r"\sqrt{8}")] * 4)
    assert descendants() - before
    pool.close()
    pool.close()
    assert descendants() <= before
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge([case("5", "5")])


@needs_proc
def test_a_worker_killed_while_idle_is_replaced_unnoticed(tmp_path):
    before = descendants()
    config = VerifierConfig(workers=1, wall_s=30.0)
    with VerifierPool(config, fake_worker(tmp_path, "send(answer)")) as pool:
        for _ in range(2):
            (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
            assert verdict.outcome is Outcome.PASS
            (worker,) = descendants() - before
            os.kill(worker, signal.SIGKILL)
            time.sleep(0.05)
        assert pool.stats()["errors"] == 0


# Equal, but sympy would have to multiply out millions of terms to see it.
POWER = "(a+b+c+d+f+g+h)^{31}"
EXPENSIVE = (f"{POWER}(a-b)", f"{POWER}a-{POWER}b")


def test_an_expensive_answer_neither_passes_nor_hurts_the_next_one():
    with VerifierPool(VerifierConfig(workers=1, wall_s=0.5)) as pool:
        (verdict,) = pool.judge([case(*EXPENSIVE)])
        # ERROR only where a crowded machine gave the worker hardly any CPU time.
        assert (verdict.outcome, verdict.category) in (
            (Outcome.FAIL, "timeout"),
            (Outcome.ERROR, ""),
        )
        assert pool.stats()["restarts"] == 2


def test_the_worker_ends_with_its_input_even_while_busy():
    busy = {"id": 1, "given": EXPENSIVE[0], "gold": EXPENSIVE[1]}
    with subprocess.Popen(WORKER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert json.loads(worker.stdout.readline())["ready"] is True
        worker.stdin.write(json.dumps(busy).encode() + b"\n")
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0
        assert worker.stdout.read() == b"", "it was still busy"


def test_nothing_printed_by_a_library_reaches_the_protocol():
    code = (
        "import sys; from cosr_jax.verifiers import symbolic, worker\n"
        "def noisy(a, b): print('noise', flush=True); return True\n"
        "symbolic.symbolically_equal = noisy\n"
        "worker.main()"
    )
    with VerifierPool(VerifierConfig(wall_s=60.0), (sys.executable, "-c", code)) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
    assert verdict.outcome is Outcome.PASS


@pytest.mark.parametrize("module", ["pool", "extraction", "math_answer"])
def test_the_parent_imports_neither_sympy_nor_jax(module):
    code = (
        f"import sys, cosr_jax.verifiers.{module}\n"
        "assert not {'sympy', 'math_verify', 'latex2sympy2_extended', 'jax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
