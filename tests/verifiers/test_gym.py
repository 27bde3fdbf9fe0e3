import asyncio
import importlib.util
import json
import os

import pytest

from cosr_jax.tasks import reasoning_gym_source
from cosr_jax.tasks.reasoning_gym_source import ReasoningGymSource
from cosr_jax.types import Completion, Outcome, ScorerChecks, Task, UserError
from cosr_jax.verifiers.dispatch import Answer, Workers
from cosr_jax.verifiers.gym import RUNS_ITS_INPUT, GymJudge, extract_item_answer
from cosr_jax.verifiers.judges import Limits

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
ITEM = {"question": "?", "answer": "b, a", "metadata": {}}


def gym_task(generator="word_sorting", item=ITEM):
    text = item if isinstance(item, str) else json.dumps(item)
    return Task("gym", generator, 0.5, "?", "", "k", checks=ScorerChecks(generator, text))


def judge_all(workers, cases):
    async def run():
        judge = GymJudge(workers)
        return await asyncio.gather(
            *(judge.judge(task, Completion((), (), text, "stop"), Limits()) for task, text in cases)
        )

    return asyncio.run(run())


def judge_really(cases):
    async def run():
        workers = Workers(count=1)
        judge = GymJudge(workers)
        try:
            await judge.start()
            return [
                await judge.judge(task, Completion((), (), text, "stop"), Limits(10.0))
                for task, text in cases
            ]
        finally:
            await workers.close()

    return asyncio.run(run())


class FixedWorkers:
    def __init__(self, answer):
        self.answer = answer
        self.cases = []

    async def ask(self, method, case, wall_s, memory_mb):
        self.cases.append(case)
        return self.answer


@pytest.mark.parametrize(
    ("answer", "outcome", "category"),
    [
        (Answer({"score": 1.0, "detail": ""}), Outcome.PASS, ""),
        (Answer({"score": 1, "detail": ""}), Outcome.PASS, ""),
        (Answer({"score": 0.999, "detail": ""}), Outcome.FAIL, "wrong_answer"),
        (Answer({"score": 1.0000000000000002, "detail": ""}), Outcome.FAIL, "wrong_answer"),
        (Answer({"score": float("nan"), "detail": ""}), Outcome.FAIL, "wrong_answer"),
        (Answer({"score": True}), Outcome.ERROR, ""),
        (Answer({"score": "1.0"}), Outcome.ERROR, ""),
        (Answer({}), Outcome.ERROR, ""),
        (Answer(None, "timeout"), Outcome.FAIL, "timeout"),
        (Answer(None, detail="worker ended"), Outcome.ERROR, ""),
    ],
)
def test_nothing_but_the_full_score_passes(answer, outcome, category):
    (verdict,) = judge_all(FixedWorkers(answer), [(gym_task(), "<answer>b, a</answer>")])
    assert (verdict.outcome, verdict.category) == (outcome, category)
    assert verdict.reward == float(outcome is Outcome.PASS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So <answer>\n1 2\n3 4\n</answer> it is", "1 2\n3 4"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("<answer>\n```\n1 2\n```\n</answer>", "1 2"),
        ("\\boxed{17}", "17"),
        ("<think><answer>1</answer></think>", ""),
        ("<answer>1", ""),
        ("<answer></answer>\\boxed{1}", ""),
        ("The answer is 17.", ""),
        ("17", ""),
        ("", ""),
    ],
)
def test_only_a_marked_answer_is_read(text, answer):
    assert extract_item_answer(text).answer == answer


@pytest.mark.parametrize("generator", sorted(RUNS_ITS_INPUT))
def test_scorers_that_run_what_they_are_given_are_never_asked(generator):
    workers = FixedWorkers(Answer({"score": 1.0}))
    (verdict,) = judge_all(workers, [(gym_task(generator), "<answer>1</answer>")])
    assert (verdict.outcome, workers.cases) == (Outcome.ERROR, [])
    assert generator in verdict.detail


@pytest.mark.parametrize("item", ["", "[]", "{}", '{"answer": 3}', '{"answer": ""}', "[" * 9999])
def test_an_item_without_an_answer_is_an_error(item):
    (verdict,) = judge_all(FixedWorkers(Answer({"score": 1.0})), [(gym_task(item=item), "1")])
    assert (verdict.outcome, verdict.detail[:5]) == (Outcome.ERROR, "task:")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "cosr-jax\[tasks\]"'):
        asyncio.run(GymJudge(FixedWorkers(Answer({}))).start())


@needs_gym
def test_no_generator_that_is_offered_runs_its_input():
    assert not set(reasoning_gym_source._SCORED) & RUNS_ITS_INPUT


@needs_gym
def test_real_scorers_pass_the_own_answer_and_nothing_around_it():
    source = ReasoningGymSource(domains=("gym",), max_level=3)
    cases, expected = [], []
    for cell in source.cells():
        if cell.endswith("/3"):
            task = source.draw(cell, 0, "train")
            own = json.loads(task.checks.item)["answer"]
            other = json.loads(source.draw(cell, 1, "train").checks.item)["answer"]
            cases += [(task, task.solution), (task, f"<answer>{own} or {other}</answer>")]
            cases += [(task, f"<answer>Maybe {own}</answer>"), (task, own)]
            expected += [Outcome.PASS, Outcome.FAIL, Outcome.FAIL, Outcome.FAIL]
    verdicts = judge_really(cases)
    assert len(verdicts) >= 80
    for case, verdict, outcome in zip(cases, verdicts, expected, strict=True):
        assert verdict.outcome is outcome, (case, verdict)


@needs_gym
def test_a_scorer_that_pays_for_garbage_is_refused_by_name(tmp_path):
    canary = tmp_path / "canary"
    attack = f"<answer>__import__('os').mkdir({str(canary)!r})</answer>"
    items = {
        "complex_arithmetic": {
            "question": "?",
            "answer": "1.0 + 2.0i",
            "metadata": {"result": [1, 2]},
        },
        "gsm_symbolic": {"question": "?", "answer": "3", "metadata": {}},
        "no_such_generator": ITEM,
    }
    cases = [(gym_task(name, item), "<answer>nan</answer>") for name, item in items.items()]
    cases += [(gym_task("puzzle24"), attack), (gym_task("word_sorting"), attack)]
    verdicts = judge_really(cases)
    for verdict, name in zip(verdicts, items, strict=False):
        assert verdict.outcome is Outcome.ERROR
        assert name in verdict.detail
    assert not os.path.lexists(canary)
