import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.config import VerifierConfig
from cosr_jax.tasks.admission import Admission, fold_prompt
from cosr_jax.tasks.code_problems import fenced, unfenced
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import CodeChecks, Completion, Outcome, Verdict
from cosr_jax.verifiers.pool import VerifierPool

SUITE = ProceduralSuite()
EVALUATION = [SUITE.draw("addition/2", seed, "test") for seed in range(20)]
TRAINING = list(
    {t.key: t for t in (SUITE.draw("addition/2", seed, "train") for seed in range(20))}.values()
)


class BoxJudge:
    """Passes what ends in the boxed answer; cannot judge the keys in ``broken``."""

    def __init__(self, broken=()):
        self.broken = broken
        self.calls = 0

    def __call__(self, cases):
        self.calls += 1
        verdicts = []
        for task, completion in cases:
            right = completion.text.endswith(f"\\boxed{{{task.answer}}}")
            outcome = Outcome.PASS if right else Outcome.FAIL
            if task.key in self.broken:
                outcome = Outcome.ERROR
            verdicts.append(Verdict(outcome, float(right)))
        return verdicts


def test_clean_tasks_are_admitted_in_order_by_one_call():
    judge = BoxJudge()
    result = Admission(judge, EVALUATION).admit(TRAINING)
    assert result.tasks == tuple(TRAINING)
    assert result.refused == {}
    assert judge.calls == 1


def test_planted_faults_are_refused_by_reason():
    good, wrong, unsolved, unjudged, first = TRAINING[:5]
    batch = [
        good,
        dataclasses.replace(wrong, answer=str(int(wrong.answer) + 1)),
        dataclasses.replace(unsolved, solution=""),
        unjudged,
        EVALUATION[0],
        dataclasses.replace(EVALUATION[1], prompt="A question put in other words?"),
        dataclasses.replace(first, prompt=EVALUATION[2].prompt.upper().replace(" ", "  ") + "!!"),
        good,
        dataclasses.replace(good, prompt="The same sum in other words."),
        dataclasses.replace(first, key="addition:other", prompt=f" {good.prompt.lower()} "),
    ]
    result = Admission(BoxJudge({unjudged.key}), EVALUATION).admit(batch)
    assert result.tasks == (good,)
    assert result.refused == {"unproven": 2, "unjudged": 1, "reserved": 3, "duplicate": 3}


class ProgramJudge:
    """Passes programs whose first line is that of the task's solution; idle ones where told so."""

    def __init__(self, idle=Outcome.FAIL):
        self.idle = idle
        self.answers = []

    def __call__(self, cases):
        self.answers = [(task, unfenced(completion.text)) for task, completion in cases]
        return [
            Verdict(self.idle if text.endswith("pass") else Outcome.PASS, 1.0)
            for _, text in self.answers
        ]


@pytest.mark.parametrize(
    ("idle", "refused"),
    [(Outcome.FAIL, {}), (Outcome.PASS, {"vacuous": 3}), (Outcome.ERROR, {"unjudged": 3})],
)
def test_programs_that_do_nothing_must_fail(idle, refused):
    suite = ProceduralSuite(domains=("code",))
    tasks = [suite.draw("py_formulas/1", seed, "train") for seed in (0, 1, 2)]
    judge = ProgramJudge(idle)
    result = Admission(judge, EVALUATION).admit(tasks)
    assert (result.refused, result.tasks) == (refused, () if refused else tuple(tasks))
    for task in tasks:
        idle_program, solution = sorted(text for t, text in judge.answers if t == task)
        assert fenced(solution) == task.solution
        names = {}
        exec(idle_program, names)
        assert names[task.checks.entry_point](1, 2, a=3) is None


@pytest.mark.parametrize(
    ("entry_point", "expected"),
    [("Queue.put", "def Queue(*args, **kwargs):\n    pass"), ("", "pass")],
)
def test_methods_and_scripts_have_idle_programs_as_well(entry_point, expected):
    task = SUITE.draw("addition/2", 0, "train")
    checks = CodeChecks(entry_point, ("assert True",))
    judge = ProgramJudge()
    task = dataclasses.replace(task, domain="code", checks=checks, solution=fenced("x = 1"))
    assert Admission(judge, ()).admit([task]).tasks == (task,)
    assert [text for _, text in judge.answers] == ["x = 1", expected]


def test_batches_do_not_know_of_each_other():
    admission = Admission(BoxJudge(), EVALUATION)
    assert admission.admit(TRAINING[:3]) == admission.admit(TRAINING[:3])


def test_nothing_to_judge_calls_nobody():
    judge = BoxJudge()
    assert Admission(judge, EVALUATION).admit(EVALUATION).tasks == ()
    assert judge.calls == 0


def test_a_verifier_that_loses_cases_is_noticed():
    with pytest.raises(ValueError):
        Admission(lambda cases: [], EVALUATION).admit(TRAINING)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 12 + 7?", "what is  12 + 7"),
        ("“Hello”, she said.", "hello she said"),
        ("A well-known sum: 3.5 * 2.", "a well known sum 3.5 * 2"),
        ("Sort 3, 1, 2!", "sort 3 1 2"),
    ],
)
def test_dress_is_folded(one, other):
    assert fold_prompt(one) == fold_prompt(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12 + 7", "12 - 7"),
        ("(3 + 4) * 5", "3 + (4 * 5)"),
        ("3.5", "35"),
        ("3.5", "3 5"),
        ("x - 3 = 4", "x = -3 + 4"),
        ("6 \u00d7 3", "6 \u00f7 3"),
    ],
)
def test_formulas_are_not_folded(one, other):
    assert fold_prompt(one) != fold_prompt(other)


@given(st.text())
def test_folding_twice_changes_nothing(text):
    assert fold_prompt(fold_prompt(text)) == fold_prompt(text)


def test_folding_keeps_the_suites_questions_apart():
    prompts: dict[str, str] = {}
    for cell in SUITE.cells():
        for seed in range(60):
            task = SUITE.draw(cell, seed, "train")
            content = task.key if task.skill != "sorting" else task.answer
            assert prompts.setdefault(fold_prompt(task.prompt), content) == content


def test_the_real_verifier_proves_every_cell_of_the_suite():
    tasks = [SUITE.draw(cell, seed, "train") for cell in SUITE.cells() for seed in range(3)]
    tasks = list({task.key: task for task in tasks}.values())
    false = [dataclasses.replace(task, solution="It is \\boxed{123456789}.") for task in tasks]
    with VerifierPool(VerifierConfig()) as pool:
        admission = Admission(pool.judge, EVALUATION)
        assert admission.admit(tasks).tasks == tuple(tasks)
        assert admission.admit(false).refused == {"unproven": len(tasks)}


def test_the_real_verifier_proves_every_code_cell_of_the_suite():
    suite = ProceduralSuite(domains=("code",))
    tasks = [suite.draw(cell, 0, "train") for cell in suite.cells()]
    vacuous = dataclasses.replace(tasks[0], checks=CodeChecks("f", ("assert callable(f)",)))
    vacuous = dataclasses.replace(vacuous, solution=fenced("def f(x):\n    return x"))
    unproven = dataclasses.replace(tasks[1], solution=tasks[2].solution)
    with VerifierPool(VerifierConfig()) as pool:
        admission = Admission(pool.judge, EVALUATION)
        assert admission.admit(tasks).tasks == tuple(tasks)
        assert admission.admit([vacuous, unproven]).refused == {"vacuous": 1, "unproven": 1}


def test_numbers_and_formulas_of_the_question_are_no_answer_to_it():
    # Copying is the first thing that reinforcement finds.
    cases = []
    for cell in SUITE.cells():
        task = SUITE.draw(cell, 0, "train")
        copies = [match[0].strip() for match in re.finditer(r"[-(\d][-+*/(),. \d]*", task.prompt)]
        longest = max(copies, key=len, default="") if task.skill != "counting" else ""
        if longest and longest.strip(" .,") != task.answer:
            text = f"\\boxed{{{longest.strip(' .,')}}}"
            cases.append((task, Completion((), (), text, "stop")))
    with VerifierPool(VerifierConfig()) as pool:
        passed = [
            (task.prompt, completion.text)
            for (task, completion), verdict in zip(cases, pool.judge(cases), strict=True)
            if verdict.outcome is not Outcome.FAIL
        ]
    assert len(cases) > 35 and not passed
