"""What a problem must prove before anybody trains on it."""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from cosr_jax.tasks.domains import COURSES
from cosr_jax.tasks.leakage import Leakage, near_duplicates
from cosr_jax.tasks.wrong_answers import idle_answers, perturbed_answers
from cosr_jax.types import AdmissionResult, CodeChecks, Completion, Outcome, Task, Verdict

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


class Admission:
    """Admits tasks that are new, unknown to every evaluation, and proven by the verifier itself.

    Refusals, by reason:
      reserved: the key or the folded prompt belongs to an evaluation task.
      duplicate: the key or the folded prompt came earlier in the batch.
      unproven: the verifier does not pass the task's own solution, or there is none.
      vacuous: its tests pass a program that does nothing.
      unjudged: the verifier could not judge one of these.

    What a model wrote (``admit_authored``) has more to prove:
      overlap: words or programs are those of an evaluation task, see ``leakage``.
      duplicate: also if it comes near an earlier task, or one that exists.
      statement: the prompt shows a boxed answer, or does not name the function that is tested.
      vacuous: also if a wrong answer passes, see ``wrong_answers``.

    Args:
      judge: the verifier's ``judge``, called at most once a batch.
      reserved: all evaluation tasks.
    """

    def __init__(self, judge: Judge, reserved: Iterable[Task]):
        self._judge = judge
        tasks = tuple(reserved)
        self._reserved_ids = {task.task_id for task in tasks}
        self._reserved_prompts = {fold_prompt(task.prompt) for task in tasks}
        self._leakage = Leakage(tasks)

    def admit(self, tasks: Sequence[Task]) -> AdmissionResult:
        """Sorts a batch into admitted and refused tasks.

        Raises:
          ValueError: the verifier answered another number of cases than it was given.
        """
        return self._admit(tasks, collections.Counter(), perturbed=False)

    def admit_authored(
        self, tasks: Sequence[Task], existing: Iterable[Task] = ()
    ) -> AdmissionResult:
        """Sorts a batch that a model wrote; ``existing`` are tasks that it must not repeat.

        Admitted tasks ask for the answer's form in the words of their domain's other tasks.

        Raises:
          ValueError: the verifier answered another number of cases than it was given.
        """
        refused: collections.Counter[str] = collections.Counter()
        prompts = [task.prompt for task in existing]
        candidates: list[Task] = []
        for task in map(_as_asked, tasks):
            if not self._is_reserved(task) and self._leakage.finds(task):
                refused["overlap"] += 1
            elif near_duplicates(task.prompt, prompts):
                refused["duplicate"] += 1
            elif not _is_stated(task):
                refused["statement"] += 1
            else:
                prompts.append(task.prompt)
                candidates.append(task)
        return self._admit(candidates, refused, perturbed=True)

    def _admit(
        self, tasks: Sequence[Task], refused: collections.Counter[str], perturbed: bool
    ) -> AdmissionResult:
        ids: set[str] = set()
        prompts: set[str] = set()
        candidates: list[Task] = []
        for task in tasks:
            prompt = fold_prompt(task.prompt)
            if self._is_reserved(task):
                refused["reserved"] += 1
            elif task.task_id in ids or prompt in prompts:
                refused["duplicate"] += 1
            elif not task.solution:
                refused["unproven"] += 1
            else:
                ids.add(task.task_id)
                prompts.add(prompt)
                candidates.append(task)

        def answers(task: Task) -> tuple[str, ...]:
            wrong = perturbed_answers(task) if perturbed else ()
            return (task.solution, *idle_answers(task), *wrong)

        cases = [
            (task, Completion((), (), text, "stop"))
            for task in candidates
            for text in answers(task)
        ]
        verdicts = self._judge(cases) if cases else []
        outcomes: dict[str, list[Outcome]] = {task.task_id: [] for task in candidates}
        for (task, _), verdict in zip(cases, verdicts, strict=True):
            outcomes[task.task_id].append(verdict.outcome)
        admitted = []
        for task in candidates:
            proof, *wrong = outcomes[task.task_id]
            if Outcome.ERROR in (proof, *wrong):
                refused["unjudged"] += 1
            elif proof is Outcome.FAIL:
                refused["unproven"] += 1
            elif Outcome.PASS in wrong:
                refused["vacuous"] += 1
            else:
                admitted.append(task)
        return AdmissionResult(tuple(admitted), dict(refused))

    def _is_reserved(self, task: Task) -> bool:
        is_known = task.task_id in self._reserved_ids
        return is_known or fold_prompt(task.prompt) in self._reserved_prompts


_BOXED = re.compile(r"\\boxed\s*\{\s*[^\s}]")


def _as_asked(task: Task) -> Task:
    """The task with its domain's instruction about the answer's form."""
    instruction = COURSES[task.domain].instruction if task.domain in COURSES else ""
    if instruction in task.prompt:
        return task
    return dataclasses.replace(task, prompt=f"{task.prompt.rstrip()} {instruction}")


def _is_stated(task: Task) -> bool:
    """Whether the prompt keeps its answer to itself and names what the tests use."""
    if isinstance(task.checks, CodeChecks):
        name = re.findall(r"^\w*", task.checks.entry_point)[0]
        return re.search(rf"\b{name}\b", task.prompt) is not None
    return _BOXED.search(task.prompt) is None
