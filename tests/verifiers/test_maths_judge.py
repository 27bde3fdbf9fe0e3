"""Verdicts on maths: forms, categories, and what symbolic comparison does to them."""

import subprocess
import sys

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Outcome, Task, UserError
from cosr_jax.verifiers.dispatch import Workers, worker_command
from cosr_jax.verifiers.front import LocalFront
from cosr_jax.verifiers.pool import VerifierPool

ROOT = r"2\sqrt{2}"  # equals sqrt(8), which only a worker can tell


def task(answer, prompt="?"):
    return Task("math", "skill", 0.0, prompt, answer, f"key:{answer}")


def says(text, finish_reason="stop"):
    return Completion((), (), text, finish_reason)


def case(answer, gold, prompt="?"):
    return task(gold, prompt), says(rf"\boxed{{{answer}}}")


def pool_with(command, **config):
    """A pool whose maths workers run ``command``."""

    def open_front(config):
        return LocalFront(config, workers=Workers(config.workers, commands={"compare": command}))

    return VerifierPool(VerifierConfig(**config), open_front)


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
    with pool_with(("/nonexistent",)) as pool:
        assert all(v.reward for v in pool.judge([case("1/2", "0.5")] * 1000))
        stats = pool.stats()
        assert stats["verdicts"] == {"pass": 1000}
        assert 0.0 < stats["latency_p50_s"] <= stats["latency_p95_s"] < 0.1


def test_workers_that_never_start_leave_only_symbolic_cases_unjudged():
    with pool_with(("/nonexistent",), workers=2) as pool:
        verdicts = pool.judge([case(ROOT, r"\sqrt{8}"), case("5", "5")] * 50)
    assert [v.outcome for v in verdicts] == [Outcome.ERROR, Outcome.PASS] * 50
    assert "did not start" in verdicts[0].detail


def worker_that(tmp_path, result):
    """A command that answers every request, but the first of its life, with ``result``."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        f"path = {str(tmp_path / 'lives')!r}\n"
        "life = os.path.exists(path)\n"
        "open(path, 'w').close()\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if not life: os.abort()\n"
        f"    answer = {{'id': json.loads(line)['id'], **{result!r}}}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    return (sys.executable, "-S", str(script))


@pytest.mark.parametrize(
    ("result", "outcome", "category"),
    [
        ({"result": {"agree": True}}, Outcome.PASS, ""),
        ({"result": {"agree": False, "detail": "no"}}, Outcome.FAIL, "wrong_answer"),
        ({"limit": "memory_limit"}, Outcome.FAIL, "memory_limit"),
        ({"result": {"agree": 1}}, Outcome.ERROR, ""),
        ({"error": "gold is odd"}, Outcome.ERROR, ""),
    ],
)
def test_a_worker_that_dies_costs_one_retry(tmp_path, result, outcome, category):
    with pool_with(worker_that(tmp_path, result), workers=1, wall_s=30.0) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
        stats = pool.stats()
    assert (verdict.outcome, verdict.category) == (outcome, category)
    assert stats["retries"] == 1
    assert stats["errors"] == (outcome is Outcome.ERROR)


def test_an_expensive_answer_in_another_form_is_no_answer(tmp_path):
    command = worker_that(tmp_path, {"limit": "memory_limit"})
    with pool_with(command, workers=1, accept=("hashes",)) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, "no_answer")


def test_an_expensive_answer_does_not_pass(tmp_path, monkeypatch):
    (tmp_path / "busy.py").write_text("def f(case):\n    while True: pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pool_with(worker_command("busy:f"), workers=1, wall_s=0.3) as pool:
        (verdict,) = pool.judge([case(ROOT, r"\sqrt{8}")])
        # ERROR only where a crowded machine gave the worker hardly any CPU time.
        assert (verdict.outcome, verdict.category) in (
            (Outcome.FAIL, "timeout"),
            (Outcome.ERROR, ""),
        )
        assert pool.stats()["restarts"] >= 2


@pytest.mark.parametrize(
    "module", ["pool", "front", "stdio", "wire", "maths", "extraction", "math_answer"]
)
def test_the_parent_imports_neither_sympy_nor_jax(module):
    code = (
        f"import sys, cosr_jax.verifiers.{module}\n"
        "heavy = {'sympy', 'math_verify', 'jax', 'numpy', 'z3', 'reasoning_gym', 'aiohttp'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
