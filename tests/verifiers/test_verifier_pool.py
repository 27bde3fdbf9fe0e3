"""The pool around its judges: order, bounds, retries, deadlines, cancellation, the end."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import (
    CodeChecks,
    Completion,
    Outcome,
    ProofChecks,
    Task,
    UserError,
    Verdict,
)
from cosr_jax.verifiers.front import LocalFront
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.pool import VerifierPool

PASS = Verdict(Outcome.PASS, 1.0)
FAIL = Verdict(Outcome.FAIL, 0.0, "wrong_answer")
ERROR = Verdict(Outcome.ERROR, 0.0, detail="no luck")


class ScriptedJudge:
    """Does what the completion says: each attempt takes the next of its words."""

    def __init__(self):
        self.attempts = {}
        self.calls, self.limits = [], []
        self.inside = self.peak = 0
        self.starts, self.is_closed, self.cancelled = 0, False, 0

    async def start(self):
        self.starts += 1

    async def close(self):
        self.is_closed = True

    async def judge(self, task, completion, limits):
        self.calls.append(completion.text)
        self.limits.append(limits)
        attempt = self.attempts[completion.text] = self.attempts.get(completion.text, -1) + 1
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            words = completion.text.split(":")[0].split()
            return await self.do(words[min(attempt, len(words) - 1)])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1

    async def do(self, word):
        await asyncio.sleep(0.001)
        match word:
            case "pass":
                return PASS
            case "fail":
                return FAIL
            case "error":
                return ERROR
            case "half":
                return Verdict(Outcome.FAIL, 0.5, "wrong_answer")
            case "bug":
                raise ZeroDivisionError("a bug")
            case "hang":
                await asyncio.sleep(1000)
            case "odd":
                return Verdict(Outcome.FAIL, 0.0, "bad_luck")
            case "blank":
                return Verdict(Outcome.FAIL, 0.0)
            case "rich":
                return Verdict(Outcome.FAIL, 7.0, "wrong_answer")
            case "full":
                return Verdict(Outcome.FAIL, 1.0, "wrong_answer")
            case "nan":
                return Verdict(Outcome.FAIL, math.nan, "wrong_answer")
            case "poor":
                return Verdict(Outcome.PASS, 0.9)
            case "disliked":
                return Verdict(Outcome.PASS, 0.8, is_subjective=True)
            case "refuse":
                raise UserError("no browser", "install one")


def pool_of(judge, **config):
    def open_front(config):
        return LocalFront(config, {"math": lambda config, workers: judge, "code": broken})

    return VerifierPool(VerifierConfig(**{"deadline_s": 60.0, **config}), open_front)


def broken(config, workers):
    raise UserError("no sandbox", "install bubblewrap")


def case(text):
    return Task("math", "s", 0.0, "?", "1", f"key:{text}"), Completion((), (), text, "stop")


CODE = Task("code", "s", 0.0, "?", "", "key:f", checks=CodeChecks(tests=("assert f()",)))
PROOF = Task("proof", "s", 0.0, "?", "", "key:p", checks=ProofChecks("smtlib", "x"))


def test_verdicts_come_in_order():
    judge = ScriptedJudge()
    with pool_of(judge, workers=4) as pool:
        words = ["pass", "fail", "pass", "error"] * 50
        verdicts = pool.judge([case(f"{word}:{i}") for i, word in enumerate(words)])
    assert [v.outcome.value for v in verdicts] == words
    assert judge.starts == 1
    assert judge.is_closed


def test_an_empty_batch_starts_nothing():
    judge = ScriptedJudge()
    with pool_of(judge) as pool:
        assert pool.judge([]) == []
    assert judge.starts == 0


def test_no_more_cases_at_once_than_workers():
    judge = ScriptedJudge()
    with pool_of(judge, workers=3) as pool:
        pool.judge([case(f"pass:{i}") for i in range(60)])
        stats = pool.stats()
    assert judge.peak == 3
    assert (stats["queue"], stats["queue_peak"]) == (0, 60)


def test_the_queue_is_bounded():
    judge = ScriptedJudge()
    with pool_of(judge, workers=1, queue=5) as pool:
        verdicts = pool.judge([case(f"pass:{i}") for i in range(40)])
        assert pool.stats()["queue_peak"] == 5
    assert [v.reward for v in verdicts] == [1.0] * 40


@pytest.mark.parametrize(
    ("words", "outcome", "attempts", "detail"),
    [
        ("error pass", Outcome.PASS, 2, ""),
        ("bug fail", Outcome.FAIL, 2, ""),
        ("error error pass", Outcome.ERROR, 2, "no luck"),
        ("bug", Outcome.ERROR, 2, "ZeroDivisionError: a bug"),
        ("odd", Outcome.ERROR, 2, "'bad_luck'"),
        ("blank", Outcome.ERROR, 2, "''"),
        ("fail pass", Outcome.FAIL, 1, ""),
    ],
)
def test_errors_are_tried_once_more(words, outcome, attempts, detail):
    judge = ScriptedJudge()
    with pool_of(judge) as pool:
        (verdict,) = pool.judge([case(words)])
        stats = pool.stats()
    assert verdict.outcome is outcome
    assert detail in verdict.detail
    assert len(judge.calls) == attempts
    assert stats["retries"] == attempts - 1
    assert stats["errors"] == (outcome is Outcome.ERROR)


def test_a_hung_judge_meets_the_deadline():
    judge = ScriptedJudge()
    with pool_of(judge, deadline_s=0.1, wall_s=0.05) as pool:
        verdicts = pool.judge([case("hang"), case("pass"), case("hang pass")])
    assert [v.outcome for v in verdicts] == [Outcome.ERROR, Outcome.PASS, Outcome.PASS]
    assert verdicts[0].detail == "no verdict within 0.2 s"
    assert judge.cancelled == 3


def test_limits_come_from_the_config_or_the_call():
    judge = ScriptedJudge()
    with pool_of(judge, wall_s=1.5, memory_mb=99, output_kb=7, file_mb=3) as pool:
        pool.judge([case("pass")])
        pool.judge([case("pass")], Limits(wall_s=0.5))
    assert judge.limits == [Limits(1.5, 99, 7, 3), Limits(wall_s=0.5)]


@pytest.mark.parametrize(("is_on", "rewards"), [(False, [0.0, 1.0]), (True, [0.5, 1.0])])
def test_partial_credit_is_asked_for(is_on, rewards):
    with pool_of(ScriptedJudge(), partial_credit=is_on) as pool:
        verdicts = pool.judge([case("half"), case("pass")])
    assert [v.reward for v in verdicts] == rewards
    assert [v.outcome for v in verdicts] == [Outcome.FAIL, Outcome.PASS]


@pytest.mark.parametrize("word", ["rich", "full", "nan", "poor"])
def test_rewards_that_no_judge_may_give_are_errors(word):
    with pool_of(ScriptedJudge(), partial_credit=True) as pool:
        (verdict,) = pool.judge([case(word)])
    assert verdict.outcome is Outcome.ERROR
    assert "with reward" in verdict.detail


@pytest.mark.parametrize("is_on", [False, True])
def test_an_opinion_may_take_something_off_a_pass(is_on):
    with pool_of(ScriptedJudge(), partial_credit=is_on) as pool:
        (verdict,) = pool.judge([case("disliked")])
    assert (verdict.outcome, verdict.reward) == (Outcome.PASS, 0.8)


def test_unknown_domains_are_refused():
    with pool_of(ScriptedJudge()) as pool:
        with pytest.raises(UserError, match="domain 'proof' has no judge"):
            pool.judge([case("pass"), (PROOF, Completion((), (), "x", "stop"))])
        assert pool.judge([case("pass")]) == [PASS]


def test_what_the_machine_lacks_is_said_with_the_remedy():
    with pool_of(ScriptedJudge()) as pool:
        for _ in range(2):
            with pytest.raises(UserError, match="no sandbox; install bubblewrap"):
                pool.judge([(CODE, Completion((), (), "x", "stop"))])
        with pytest.raises(UserError, match="no browser"):
            pool.judge([case("refuse")])


def test_a_layer_asked_for_by_name_has_to_be_there_at_once():
    with pytest.raises(UserError, match="no sandbox; install bubblewrap"):
        pool_of(ScriptedJudge(), layer="bubblewrap")
    assert not [thread for thread in threading.enumerate() if thread.name == "verifier pool"]


def test_a_judge_that_does_not_start_is_an_error_and_tried_again():
    class Late(ScriptedJudge):
        async def start(self):
            await super().start()
            if self.starts <= 3:
                raise OSError("disk is full")

    judge = Late()
    with pool_of(judge) as pool:
        (first,) = pool.judge([case("pass:1")])
        (second,) = pool.judge([case("pass:2")])
    assert (first.outcome, first.detail) == (Outcome.ERROR, "OSError: disk is full")
    assert second == PASS
    assert judge.starts == 4


def test_stats_count_by_category_and_domain():
    with pool_of(ScriptedJudge()) as pool:
        pool.judge([case(f"{word}:{i}") for i, word in enumerate(["pass", "fail", "fail", "bug"])])
        stats = pool.stats()
    assert stats["verdicts"] == {"pass": 1, "wrong_answer": 2, "error": 1}
    assert stats["by_domain"] == {"math": stats["verdicts"]}
    assert 0.001 <= stats["latency_p50_s"] <= stats["latency_p95_s"] < 5
    assert pool.stats() == stats  # after the end, too


def test_callers_with_a_loop_of_their_own():
    async def run(pool):
        batches = [[case(f"pass:{i}{j}") for j in range(5)] for i in range(5)]
        return await asyncio.gather(*(pool.judge_async(batch) for batch in batches))

    with pool_of(ScriptedJudge()) as pool:
        assert asyncio.run(run(pool)) == [[PASS] * 5] * 5


def test_a_caller_who_gives_up_leaves_no_case_running():
    judge = ScriptedJudge()

    async def run(pool):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.judge_async([case("hang:1"), case("hang:2")]), 0.2)

    with pool_of(judge, workers=2) as pool:
        asyncio.run(run(pool))
        assert pool.judge([case("pass")]) == [PASS]  # the slots are free again
        assert judge.cancelled == 2
        assert pool.stats()["queue"] == 0


def test_threads_share_a_pool():
    found = {}
    with pool_of(ScriptedJudge(), workers=4) as pool:

        def work(n):
            words = ["pass" if (i + n) % 2 else "fail" for i in range(50)]
            verdicts = pool.judge([case(f"{word}:{n}/{i}") for i, word in enumerate(words)])
            found[n] = [v.outcome is Outcome.PASS for v in verdicts] == [w == "pass" for w in words]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_closing_a_busy_pool_frees_who_waits():
    judge = ScriptedJudge()
    pool = pool_of(judge)
    failures = []

    def wait():
        try:
            pool.judge([case("hang")])
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while not judge.calls:
        time.sleep(0.01)
    pool.close()
    pool.close()
    thread.join(timeout=120)
    assert failures == ["the verifier pool was closed meanwhile"]
    assert judge.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge([case("pass")])


def test_ctrl_c_ends_a_batch_and_its_workers(tmp_path):
    """A symbolic comparison that hangs; the interrupt must not leave its worker behind."""
    code = f"""
        import os, sys
        from cosr_jax.config import VerifierConfig
        from cosr_jax.types import Completion, Task
        from cosr_jax.verifiers.dispatch import Workers
        from cosr_jax.verifiers.front import LocalFront
        from cosr_jax.verifiers.pool import VerifierPool

        worker = (
            "import os, sys, time\\n"
            "print('{{\\"ready\\": true}}', flush=True)\\n"
            "sys.stdin.readline()\\n"
            "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid()) + '.')\\n"
            "time.sleep(1000)"
        )
        commands = {{"compare": (sys.executable, "-S", "-c", worker)}}

        def open_front(config):
            return LocalFront(config, workers=Workers(1, commands=commands))

        task = Task("math", "s", 0.0, "?", r"\\sqrt{{8}}", "key")
        with VerifierPool(VerifierConfig(wall_s=500.0), open_front) as pool:
            pool.judge([(task, Completion((), (), r"\\boxed{{2\\sqrt{{2}}}}", "stop"))])
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE
    ) as process:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text().endswith(".")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=240) != 0
        finally:
            process.kill()
        assert b"KeyboardInterrupt" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()[:-1]), 0)
