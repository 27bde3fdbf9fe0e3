"""What a problem must prove before anybody trains on it."""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from cosr_jax.tasks.code_problems import fenced
from cosr_jax.types import CodeChecks, Completion, Outcome, Task, Verdict

Judge = Callable[[Sequence[tuple[Task, Completion]]], Sequence[Verdict]]

#: Whatever only dresses a sentence.  Operators, brackets and points inside numbers carry meaning:
#: without them "12 + 7" and "12 - 7" would be the same question.
_DRESS = re.compile(
    r"(?<!\d)\.|\.(?!\d)|(?<=[^\W\d])-(?=[^\W\d])|[^\w\s.+\-*/=<>^%()\u00d7\u00f7\u2212]|_"
)


def fold_prompt(prompt: str) -> str:
    """``prompt`` without case, punctuation and spacing: equal for the same words and formulas."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(_DRESS.sub(" ", text).split())


@dataclasses.dataclass(frozen=True)
class AdmissionResult:
    """The admitted tasks, in the order given, and how many were refused for which reason."""

    tasks: tuple[Task, ...]
    refused: Mapping[str, int]  # count by reason, see ``Admission``


class Admission:
    """Admits tasks that are new, unknown to every evaluation, and proven by the verifier itself.

    Refusals, by reason:
      reserved: the key or the folded prompt belongs to an evaluation task.
      duplicate: the key or the folded prompt came earlier in the batch.
      unproven: the verifier does not pass the task's own solution, or there is none.
      vacuous: its tests pass a program that does nothing.
      unjudged: the verifier could not judge one of these.

    Args:
      judge: the verifier's ``judge``, called at most once a batch.
      reserved: all evaluation tasks.
    """

    def __init__(self, judge: Judge, reserved: Iterable[Task]):
        self._judge = judge
        tasks = tuple(reserved)
        self._reserved_ids = {task.task_id for task in tasks}
        self._reserved_prompts = {fold_prompt(task.prompt) for task in tasks}

    def admit(self, tasks: Sequence[Task]) -> AdmissionResult:
        """Sorts a batch into admitted and refused tasks.

        Raises:
          ValueError: the verifier answered another number of cases than it was given.
        """
        refused: collections.Counter[str] = collections.Counter()
        ids: set[str] = set()
        prompts: set[str] = set()
        candidates: list[Task] = []
        for task in tasks:
            prompt = fold_prompt(task.prompt)
            if task.task_id in self._reserved_ids or prompt in self._reserved_prompts:
                refused["reserved"] += 1
            elif task.task_id in ids or prompt in prompts:
                refused["duplicate"] += 1
            elif not task.solution:
                refused["unproven"] += 1
            else:
                ids.add(task.task_id)
                prompts.add(prompt)
                candidates.append(task)
        cases = [
            (task, Completion((), (), text, "stop"))
            for task in candidates
            for text in (task.solution, *_idle_answers(task))
        ]
        verdicts = self._judge(cases) if cases else []
        outcomes: dict[str, list[Outcome]] = {task.task_id: [] for task in candidates}
        for (task, _), verdict in zip(cases, verdicts, strict=True):
            outcomes[task.task_id].append(verdict.outcome)
        admitted = []
        for task in candidates:
            proof, *idle = outcomes[task.task_id]
            if Outcome.ERROR in (proof, *idle):
                refused["unjudged"] += 1
            elif proof is Outcome.FAIL:
                refused["unproven"] += 1
            elif Outcome.PASS in idle:
                refused["vacuous"] += 1
            else:
                admitted.append(task)
        return AdmissionResult(tuple(admitted), dict(refused))


def _idle_answers(task: Task) -> tuple[str, ...]:
    """Answers that do nothing, which no worthwhile task accepts: for code, an empty function."""
    if not isinstance(task.checks, CodeChecks):
        return ()
    name = re.findall(r"^\w*", task.checks.entry_point)[0]
    return (fenced(f"def {name}(*args, **kwargs):\n    pass" if name else "pass"),)
