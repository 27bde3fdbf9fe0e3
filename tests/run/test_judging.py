"""Verdicts reach their tasks whatever the order in which they come, and so do failures.

That judging overlaps with a real sampler's decoding: ``tests/rollout/test_jax_sampler.py``.
"""

import threading

import pytest
from fakes import FakeChat, FakeEngine, FakeVerifier, make_task

from cosr_jax.run.evaluation import measure
from cosr_jax.run.judging import JudgeClock, Judging
from cosr_jax.run.practice import sample_groups
from cosr_jax.types import Completion, Finished, Outcome, SamplingParams, UserError

#: Bounds a failure; nothing that passes waits as long.
PATIENCE_S = 60


def test_the_order_of_verdicts_is_that_of_the_tasks():
    """The engine tells of its groups from the last to the first, and the verifier answers late."""
    tasks = [make_task("a/1", number) for number in range(4)]
    gate = threading.Barrier(4, timeout=PATIENCE_S)

    class Slow(FakeVerifier):
        def judge(self, cases):
            gate.wait()  # all groups are under way at once
            return super().judge(cases)

    answers = {task.prompt: f"[{number % 2 and task.answer}]" for number, task in enumerate(tasks)}
    engine = FakeEngine(lambda prompt, sample, seed: answers[prompt] if sample else "x")
    groups = sample_groups(tasks, 2, SamplingParams(8), engine, FakeChat(), Slow(), 0)
    passed = [[v.outcome is Outcome.PASS for v in group.verdicts] for group in groups]
    assert passed == [[False, True], [False, True], [False, False], [False, True]]


def test_answers_to_probes_are_judged_while_others_are_decoded():
    tasks = [make_task("a/1", number) for number in range(3)]
    begun = threading.Event()

    class Beginning(FakeVerifier):
        def judge(self, cases):
            begun.set()
            return super().judge(cases)

    class Halting(FakeEngine):
        """Decodes the last answer only once judging has begun."""

        def generate(self, *args):
            *arguments, on_finished = args
            left = [3]

            def telling(finished):
                left[0] -= 1
                if left[0] == 0:
                    assert begun.wait(PATIENCE_S)
                return on_finished(finished)

            return super().generate(*arguments, telling)

    engine = Halting(lambda prompt, sample, seed: "[1]")
    result = measure(tasks, engine, FakeChat(), Beginning(), 8)
    assert result.strict == (False, True, False)


class Refusing(FakeVerifier):
    """Cannot judge tasks whose answers are in ``bad``."""

    def __init__(self, *bad):
        super().__init__()
        self.bad = bad

    def judge(self, cases):
        ((task, _),) = cases
        if task.answer in self.bad:
            raise UserError(f"no judge for {task.answer}", "another task")
        return super().judge(cases)


def test_what_the_verifier_raises_of_the_first_task_surfaces():
    tasks = [make_task("a/1", number) for number in range(4)]
    engine = FakeEngine(lambda prompt, sample, seed: "[1]")
    with pytest.raises(UserError, match="no judge for 1"):
        sample_groups(tasks, 1, SamplingParams(8), engine, FakeChat(), Refusing("3", "1"), 0)


def test_a_failing_engine_does_not_wait_for_the_verifier():
    release = threading.Event()

    class Stuck(FakeVerifier):
        def judge(self, cases):
            release.wait(PATIENCE_S)
            return super().judge(cases)

    class Failing:
        def generate(self, prompts, num_generations, sampling, seed, on_finished):
            on_finished(Finished(0, 0, Completion((1,), (0.0,), "[0]", "stop")))
            raise RuntimeError("out of memory")

    tasks = [make_task("a/1", number) for number in range(2)]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample_groups(tasks, 1, SamplingParams(8), Failing(), FakeChat(), Stuck(), 0)
        assert not release.is_set()
    finally:
        release.set()


def test_the_clock_counts_time_once_however_many_cases_are_judged(monkeypatch):
    now = 0.0
    monkeypatch.setattr("cosr_jax.run.judging.time.monotonic", lambda: now)
    clock = JudgeClock()
    with clock.judging():
        now = 1.0
        with clock.judging():
            now = 3.0
        now = 4.0
    now = 10.0
    with clock.judging(), clock.waiting():
        now = 12.0
    assert (clock.busy_s, clock.waited_s) == (6.0, 2.0)


def test_groups_that_nobody_told_of_are_judged_all_the_same():
    task = make_task("a/1", 7)
    verifier, done = FakeVerifier(), Completion((1,), (0.0,), "[7]", "stop")
    with Judging(verifier, [task, task], 2, JudgeClock()) as judging:
        assert not judging.note(Finished(1, 1, done))  # half a group
        assert not verifier.batches
        first, second = judging.verdicts([(done, done), (done, done)])
    assert [v.outcome for v in (*first, *second)] == [Outcome.PASS] * 4
    assert len(verifier.batches) == 2
