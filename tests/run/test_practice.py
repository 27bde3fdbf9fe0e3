import collections
import dataclasses
import subprocess
import sys

import pytest
from fakes import FakeChat, FakeEngine, FakeSource, FakeVerifier, make_task
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.run.practice import (
    count_evidence,
    derive_seed,
    draw_tasks,
    failed_samples,
    is_formatted,
    sample_groups,
)
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.replay import ReplayBuffer
from cosr_jax.types import (
    AUTHORED,
    CellEvidence,
    CodeChecks,
    Completion,
    FailedSample,
    Outcome,
    Plan,
    ProofChecks,
    RolloutGroup,
    SamplingParams,
    ScorerChecks,
    UserError,
    Verdict,
    WebChecks,
)

LARGE = 10**6


def make_plan(mixture, replay_fraction=0.0):
    return Plan("reinforce", "grpo", mixture, 4, replay_fraction, 1.0, "", "")


def draw(mixture, count, seed=0, sizes=None, replayed=(), replay_fraction=0.0, **options):
    source = FakeSource(sizes or {cell: LARGE for cell, _ in mixture})
    replay = ReplayBuffer(100)
    replay.add(replayed)
    admission = options.pop("admission", Admission(FakeVerifier().judge, ()))
    plan = make_plan(mixture, replay_fraction)
    return draw_tasks(plan, count, source, replay, admission, seed, **options)


def by_cell(tasks):
    return collections.Counter(task.cell for task in tasks)


@given(st.lists(st.integers(0, 10), min_size=1, max_size=4).filter(sum), st.integers(1, 40))
def test_fresh_tasks_are_distinct_and_in_proportion(weights, count):
    mixture = tuple((f"s{i}/1", weight / sum(weights)) for i, weight in enumerate(weights))
    tasks = draw(mixture, count, seed=count)
    assert len({task.key for task in tasks}) == len(tasks) == count
    drawn = by_cell(tasks)
    for cell, weight in mixture:
        # Systematic sampling is never further off than one task; and one more of rounding.
        assert abs(drawn[cell] - weight * count) < 1 + 1e-9
        assert weight > 0 or drawn[cell] == 0


def test_the_share_from_replay_is_the_plans():
    past = [make_task("b/2", number) for number in range(30)]
    tasks = draw((("a/1", 1.0),), 20, replayed=past, replay_fraction=0.3)
    assert by_cell(tasks) == {"a/1": 14, "b/2": 6}


def test_a_short_replay_is_filled_up_with_fresh_tasks():
    past = [make_task("b/2", number) for number in range(2)]
    tasks = draw((("a/1", 1.0),), 10, replayed=past, replay_fraction=0.5)
    assert by_cell(tasks) == {"a/1": 8, "b/2": 2}


def authored(*numbers):
    tasks = (make_task("c/3", number) for number in numbers)
    return tuple(dataclasses.replace(task, source=AUTHORED) for task in tasks)


def test_authored_tasks_take_their_share_and_no_more_than_there_are():
    source, replay = FakeSource({"a/1": LARGE}), ReplayBuffer(100)
    admission = Admission(FakeVerifier().judge, ())
    plan = dataclasses.replace(
        make_plan((("a/1", 1.0),)), authored=authored(*range(20)), authored_share=0.4
    )
    drawn = [draw_tasks(plan, 10, source, replay, admission, seed) for seed in range(30)]
    assert all(by_cell(tasks) == {"a/1": 6, "c/3": 4} for tasks in drawn)
    assert all(len({task.key for task in tasks}) == 10 for tasks in drawn)
    used = {task.key for tasks in drawn for task in tasks if task.cell == "c/3"}
    assert used == {task.key for task in plan.authored}  # all of them get their turn
    few = dataclasses.replace(plan, authored=authored(1), authored_share=1.0)
    assert by_cell(draw_tasks(few, 4, source, replay, admission, 0)) == {"a/1": 3, "c/3": 1}
    unfit = draw_tasks(plan, 10, source, replay, admission, 0, lambda task: task.cell == "a/1")
    assert by_cell(unfit) == {"a/1": 10}


def test_authored_tasks_are_no_evidence_of_their_cell():
    (task,) = authored(3)
    completion = Completion((1,), (-1.0,), "[3]", "stop")
    passed = Verdict(Outcome.PASS, 1.0, method="boxed", value_correct=True)
    assert count_evidence([RolloutGroup(task, (1,), (completion,), (passed,))], ("boxed",)) == []


def test_failed_samples_keep_no_clock():
    task = make_task("a/1", 3)
    texts = ("[3]", "[4]", "?", "x" * 20_000)
    completions = tuple(Completion((1,), (-1.0,), text, "stop") for text in texts)
    verdicts = [
        dataclasses.replace(verdict, seconds=1.5)
        for verdict in FakeVerifier().judge([(task, c) for c in completions])
    ]
    failures = failed_samples([RolloutGroup(task, (1,), completions, tuple(verdicts))])
    assert [len(failure.text) for failure in failures] == [3, 8000]
    assert all(failure.verdict.seconds == 0.0 for failure in failures)
    assert [FailedSample.from_dict(f.to_dict()) for f in failures] == failures


def test_the_seed_decides():
    mixture = (("a/1", 0.5), ("b/1", 0.5))
    assert draw(mixture, 8, seed=3) == draw(mixture, 8, seed=3)
    assert draw(mixture, 8, seed=3) != draw(mixture, 8, seed=4)


def test_fresh_tasks_come_from_the_training_split():
    source = FakeSource({"a/1": LARGE})
    admission = Admission(FakeVerifier().judge, ())
    draw_tasks(make_plan((("a/1", 1.0),)), 5, source, ReplayBuffer(5), admission, 0)
    assert {split for _, split in source.draws} == {"train"}


def test_replayed_tasks_are_not_drawn_afresh():
    past = [make_task("a/1", number) for number in range(4)]
    for seed in range(20):
        tasks = draw((("a/1", 1.0),), 6, seed, {"a/1": 8}, replayed=past, replay_fraction=0.5)
        assert len({task.key for task in tasks}) == 6


@pytest.mark.parametrize("seed", range(20))
def test_a_small_cell_is_drawn_to_its_last_task(seed):
    tasks = draw((("a/1", 1.0),), 8, seed, {"a/1": 8})
    assert sorted(int(task.answer) for task in tasks) == list(range(8))


def test_an_exhausted_cell_leaves_its_share_to_the_others():
    mixture = (("a/1", 0.5), ("b/1", 0.5))
    assert by_cell(draw(mixture, 12, sizes={"a/1": 2, "b/1": LARGE})) == {"a/1": 2, "b/1": 10}


def test_too_few_tasks_are_an_error_with_a_remedy():
    with pytest.raises(UserError, match="cells a/1 yield 5 distinct tasks of 6 wanted") as error:
        draw((("a/1", 1.0),), 6, sizes={"a/1": 5})
    assert "config.curator.focus" in error.value.remedy


def test_tasks_that_do_not_fit_are_passed_over_also_in_replay():
    past = [make_task("a/1", number) for number in range(100, 120)]

    def is_even(task):
        return int(task.answer) % 2 == 0

    tasks = draw(
        (("a/1", 1.0),), 20, replayed=past, replay_fraction=0.5, fits=is_even, sizes={"a/1": 100}
    )
    assert len(tasks) == 20
    assert all(map(is_even, tasks))
    with pytest.raises(UserError, match="yield 0 distinct tasks of 3"):
        draw((("a/1", 1.0),), 3, fits=lambda task: False)


def test_evaluation_tasks_are_never_trained_on():
    reserved = [make_task("a/1", number) for number in range(0, 20, 2)]
    admission = Admission(FakeVerifier().judge, reserved)
    tasks = draw((("a/1", 1.0),), 10, sizes={"a/1": 20}, admission=admission)
    assert not {task.key for task in tasks} & {task.key for task in reserved}


def test_samples_and_verdicts_stay_with_their_task():
    """Sample i of task n answers n + i, so only sample 0 is right; task 3's cannot be judged."""
    tasks = [make_task("a/1", number) for number in (7, 3, 5)]
    by_prompt = {task.prompt: task for task in tasks}

    def answer(prompt, sample, seed):
        number = int(by_prompt[prompt].answer)
        return "?" if number == 3 else f"[{number + sample}]"

    engine, verifier = FakeEngine(answer), FakeVerifier()
    sampling = SamplingParams(8, temperature=0.9)
    groups = sample_groups(tasks, 3, sampling, engine, FakeChat(), verifier, seed=42)
    assert engine.calls == [(tuple(by_prompt), 3, sampling, 42)]
    assert [group.task for group in groups] == tasks
    for group in groups:
        assert group.prompt_ids == FakeChat().encode_prompt(group.task.prompt)
        texts = [answer(group.task.prompt, i, 42) for i in range(3)]
        assert [c.text for c in group.completions] == texts
    outcomes = [[v.outcome for v in group.verdicts] for group in groups]
    judged = [Outcome.PASS, Outcome.FAIL, Outcome.FAIL]
    assert outcomes == [judged, [Outcome.ERROR] * 3, judged]
    assert [len(batch) for batch in verifier.batches] == [3, 3, 3]


def test_a_missing_verdict_is_noticed():
    class Short(FakeVerifier):
        def judge(self, cases):
            return super().judge(cases)[:-1]

    tasks = [make_task("a/1", number) for number in range(2)]
    engine = FakeEngine(lambda prompt, sample, seed: "[0]")
    with pytest.raises(ValueError, match="1 verdicts for 2 completions"):
        sample_groups(tasks, 2, SamplingParams(8), engine, FakeChat(), Short(), 0)


PASSED = Verdict(Outcome.PASS, 1.0, method="boxed", value_correct=True)
BARE = Verdict(Outcome.FAIL, 0.0, "no_answer", method="bare", value_correct=True)
WRONG = Verdict(Outcome.FAIL, 0.0, "wrong_answer", method="boxed")
ERROR = Verdict(Outcome.ERROR, 1.0, method="boxed", value_correct=True)


def judged(cell, *verdicts, number=0):
    completion = Completion((1,), (-1.0,), "", "stop")
    group = RolloutGroup(make_task(cell, number), (1,), (completion,) * len(verdicts))
    return group.judged(verdicts)


def test_evidence_is_counted_by_cell_without_errors():
    groups = [
        judged("b/1", PASSED, WRONG, ERROR, BARE),
        judged("a/2", WRONG, WRONG),
        judged("b/1", PASSED, ERROR, PASSED, number=1),
        judged("c/1", ERROR, ERROR),
    ]
    assert count_evidence(groups, ("boxed",)) == [
        CellEvidence("a/2", samples=2, formatted=2, groups=1),
        CellEvidence(
            "b/1",
            samples=5,
            passed=3,
            value_correct=4,
            formatted=4,
            groups=2,
            informative_groups=1,
        ),
        CellEvidence("c/1"),
    ]
    (bare,) = count_evidence([judged("a/1", BARE, WRONG)], ("bare", "phrase"))
    assert bare.formatted == 1
    assert count_evidence([], ("boxed",)) == []


@pytest.mark.parametrize(
    ("domain", "method", "formatted"),
    [
        ("math", "boxed", True),
        ("math", "bare", False),
        ("math", "", False),
        ("gym", "answer_tag", True),
        ("code", "fence", True),
        ("code", "", False),
        ("proof", "term", True),
        ("web", "", False),
    ],
)
def test_each_domain_has_its_own_form(domain, method, formatted):
    checks = {
        "math": None,
        "gym": ScorerChecks("chain_sum", "{}"),
        "code": CodeChecks("f", ("assert f()",)),
        "proof": ProofChecks("property", "x"),
        "web": WebChecks("{}"),
    }[domain]
    task = dataclasses.replace(make_task("a/1", 1), domain=domain, checks=checks)
    verdict = Verdict(Outcome.FAIL, 0.0, "wrong_answer", method=method)
    assert is_formatted(task, verdict, ("boxed",)) is formatted
    completion = Completion((1,), (-1.0,), "", "stop")
    (evidence,) = count_evidence([RolloutGroup(task, (1,), (completion,), (verdict,))], ("boxed",))
    assert evidence.formatted == formatted


verdicts = st.sampled_from([PASSED, BARE, WRONG, ERROR])
some_groups = st.lists(
    st.builds(
        lambda cell, given: judged(cell, *given),
        st.sampled_from(["a/1", "a/2", "b/1"]),
        st.lists(verdicts, min_size=1, max_size=4),
    ),
    max_size=6,
)


@given(some_groups, some_groups)
def test_evidence_adds_up_and_is_consistent(some, more):
    together = {e.cell: e for e in count_evidence(some + more, ("boxed",))}
    apart = {e.cell: e for e in count_evidence(some, ("boxed",))}
    for e in count_evidence(more, ("boxed",)):
        apart[e.cell] = apart[e.cell] + e if e.cell in apart else e
    assert together == apart
    assert list(together) == sorted(together)
    for e in together.values():
        assert e.passed <= min(e.value_correct, e.formatted) <= e.samples
        assert e.informative_groups <= e.groups <= e.samples


def test_seeds_differ_by_name_and_are_the_same_in_every_process():
    names = [(0, "practice", 1), (0, "practice", 2), (1, "practice", 1), (0, "study", 1)]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    code = f"from cosr_jax.run.practice import derive_seed as d; print([d(*n) for n in {names}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == str(seeds)
