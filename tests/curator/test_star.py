"""Worked solutions of the student's own: right, not copied from a hint, and for the plain task."""

import dataclasses

import pytest
from openai_server import OpenAiServer
from scripted_students import Student, Teacher, diagnose, judge, make_curator, make_lab

from cosr_jax.curator.analysis import Weakness
from cosr_jax.curator.audit import Finding
from cosr_jax.curator.star import own_solutions
from cosr_jax.types import AUTHORED, Completion, Outcome, RolloutGroup, Verdict

FINDING = Finding(
    Weakness("addition", "logic", (), 0.5, ""), True, "", ("addition/1", "addition/2")
)


class Hinted(Student):
    """Never adds without a hint; shown the answer it mostly explains, sometimes copies the hint."""

    def __init__(self):
        super().__init__({("addition", "logic"): 1.0})

    def _answer(self, task, rng):
        if "The answer is" not in task.prompt:
            return super()._answer(task, rng)
        if rng.random() < 0.3:
            return Completion((), (), f"As if I did not know: \\boxed{{{task.answer}}}", "stop")
        if rng.random() < 0.3:
            return Completion((), (), f"\\boxed{{{task.answer}}}", "length")
        return Completion((), (), f"I add up. {task.solution}", "stop")


def test_without_a_hint_right_answers_to_what_is_solved_at_times_are_kept():
    lab = make_lab(Student({("addition", "logic"): 0.5}))
    made = own_solutions("star", FINDING, 6, 8, lab)
    assert len(made.tasks) == 6
    for task in made.tasks:
        assert task.source == AUTHORED and task.cell in FINDING.cells
        assert 0.0 < made.rates[task.task_id] < 1.0
        assert task.task_id in lab.admitted
    verdicts = judge([(t, Completion((), (), t.solution, "stop")) for t in made.tasks])
    assert all(verdict.outcome is Outcome.PASS for verdict in verdicts)


@pytest.mark.parametrize(("form", "share"), [("star", 1.0), ("star_hint", 0.5)])
def test_nothing_is_kept_of_what_the_form_is_not_for(form, share):
    # Never solved is nothing for STaR alone; solved at times needs no hint.
    made = own_solutions(form, FINDING, 6, 16, make_lab(Student({("addition", "logic"): share})))
    assert made.tasks == () and made.refused["no_own_solution"] == made.written


def test_with_a_hint_the_task_is_kept_without_it():
    made = own_solutions("star_hint", FINDING, 6, 8, make_lab(Hinted()))
    assert len(made.tasks) == 6
    for task in made.tasks:
        assert "The answer is" not in task.prompt and "did not know" not in task.solution
        assert task.solution.startswith("I add up.")
        assert made.rates[task.task_id] == 0.0


def test_answers_that_were_cut_or_not_judged_are_no_solutions():
    class Cut(Student):
        def sample(self, tasks, count, seed):
            done = [Completion((), (), task.solution, "length") for task in tasks]
            passed = Verdict(Outcome.PASS, 1.0), Verdict(Outcome.FAIL, 0.0, "truncated")
            return [RolloutGroup(t, (1,), (d, d), passed) for t, d in zip(tasks, done, strict=True)]

    assert own_solutions("star", FINDING, 6, 2, make_lab(Cut({}))).tasks == ()


def test_an_evaluation_task_is_not_studied():
    student = Student({("addition", "logic"): 0.5})
    free = own_solutions("star", FINDING, 6, 8, make_lab(student)).tasks
    held_out = own_solutions("star", FINDING, 6, 8, make_lab(student, reserved=free))
    assert not {t.task_id for t in held_out.tasks} & {t.task_id for t in free}
    assert held_out.refused["reserved"] > 0


def test_a_drawn_task_that_was_changed_counts_as_written():
    lab = make_lab(Student({}))
    (task,) = lab.draw("addition/1", 1)
    assert lab.admit([task]).tasks == (task,)
    solved_otherwise = dataclasses.replace(task, solution="\\boxed{-1}")
    assert lab.admit([solved_otherwise]).refused == {"unproven": 1}
    reworded = dataclasses.replace(task, prompt=f"{task.prompt} So \\boxed{{{task.answer}}}.")
    assert lab.admit([reworded]).refused == {"statement": 1}


def test_star_is_a_strategy_of_the_bandit_and_makes_a_round_of_sft():
    class Star(Teacher):
        def _propose(self, data):
            names = {arm["strategy"] for arm in data["arms"]}
            assert {"star", "star_hint"} <= names
            return {**super()._propose(data), "strategy": "star"}

    with OpenAiServer(Star()) as server:
        curator = make_curator(server.url)
        student = Student({("addition", "logic"): 0.5})
        plan = curator.plan(diagnose(student, seed=1), make_lab(student))
    assert (plan.strategy, plan.algorithm) == ("star", "sft")
    assert plan.authored and "solutions of the student's own" in plan.reason
    assert curator.chains[0]["authored"]["kept"]


def test_taking_tasks_apart_is_for_when_it_is_stuck():
    offered = []

    class Noting(Teacher):
        def _propose(self, data):
            offered.append("decomposition" in {arm["strategy"] for arm in data["arms"]})
            return super()._propose(data)

    with OpenAiServer(Noting()) as server:
        for share in (0.5, 0.95):  # solved at times; hardly ever
            student = Student({("addition", "logic"): share})
            make_curator(server.url).plan(diagnose(student, seed=1), make_lab(student))
        curator = make_curator(server.url)
        student = Student({("addition", "logic"): 0.5})
        for number in (1, 2, 3):  # two rounds without a gain
            plan = curator.plan(diagnose(student, number, seed=number), make_lab(student, number))
            curator.observe_gain(plan, 0.0)
    assert offered == [False, True, False, False, True]
