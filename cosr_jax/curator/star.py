"""Worked solutions of the student's own: STaR, with and without a hint (arXiv:2203.14465).

Without: of fresh tasks of the weak cells that it solves at times, one of its right answers each.
With: tasks that it never solves are shown with their answer, and where it then gets there, the task
is kept without the hint.  Nothing is kept that the verifier does not pass.
"""

from __future__ import annotations

import dataclasses

from cosr_jax.curator.audit import Finding
from cosr_jax.curator.authoring import Authored
from cosr_jax.protocols import Lab
from cosr_jax.types import AUTHORED, Outcome, RolloutGroup, Task

#: Strategies, in the order in which the bandit tries them.
STAR = ("star", "star_hint")

_HINT = "\nThe answer is {answer}. Work it out step by step, as if you did not know that."
#: Words of the hint that give an answer away as copied.
_GIVEAWAYS = ("as if", "did not know", "didn't know", "hint", "given answer")


def own_solutions(form: str, finding: Finding, count: int, samples: int, lab: Lab) -> Authored:
    """Up to ``count`` tasks of the weak cells with solutions of the student's own.

    Args:
      form: one of ``STAR``.
      finding: the weakness.
      count: tasks wanted; twice as many are drawn.
      samples: answers to each.
      lab: draws, samples and admits.
    """
    cells = finding.cells
    each = -(-2 * count // len(cells))
    groups = lab.sample([task for cell in cells for task in lab.draw(cell, each)], samples)
    rates = {group.task.task_id: _rate(group) for group in groups}
    solved: list[tuple[Task, RolloutGroup]] = []
    if form == "star":
        solved = [(g.task, g) for g in groups if 0.0 < rates[g.task.task_id] < 1.0]
    else:
        failed = {g.task.task_id: g.task for g in groups if not rates[g.task.task_id]}
        shown = [_hinted(task) for task in failed.values() if task.answer]
        solved = [
            (failed[hinted.task_id], group)
            for hinted, group in zip(shown, lab.sample(shown, samples), strict=True)
        ]
    own = [
        dataclasses.replace(task, solution=text, source=AUTHORED)
        for task, group in solved
        if (text := _right_answer(group, is_hinted=form == "star_hint"))
    ]
    admitted = lab.admit(own[:count])
    refused = dict(admitted.refused)
    if len(groups) > len(own):
        refused["no_own_solution"] = len(groups) - len(own)
    return Authored(admitted.tasks, rates, len(groups), dict(sorted(refused.items())))


def _hinted(task: Task) -> Task:
    return dataclasses.replace(task, prompt=task.prompt + _HINT.format(answer=task.answer))


def _rate(group: RolloutGroup) -> float:
    """Share of judged answers that pass; 0 if none was judged."""
    judged = [v for v in group.verdicts if v.outcome is not Outcome.ERROR]
    return sum(v.outcome is Outcome.PASS for v in judged) / max(1, len(judged))


def _right_answer(group: RolloutGroup, is_hinted: bool) -> str:
    """The longest right answer, which tells most of the way; "" if there is none."""
    texts = [
        done.text
        for done, verdict in zip(group.completions, group.verdicts, strict=True)
        if verdict.outcome is Outcome.PASS and done.finish_reason == "stop"
    ]
    if is_hinted:
        texts = [text for text in texts if not any(w in text.lower() for w in _GIVEAWAYS)]
    return max(texts, key=len, default="")
