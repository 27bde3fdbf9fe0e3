"""What a problem must prove before anybody trains on it."""

from __future__ import annotations

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from cosr_jax.types import Completion, Outcome, Task, Verdict

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
    refused: Mapping[str, int]  # reserved | duplicate | unproven | unjudged -> count


class Admission:
    """Admits tasks that are new, unknown to every evaluation, and proven by the verifier itself.

    Refusals, by reason:
      reserved: the key or the folded prompt belongs to an evaluation task.
      duplicate: the key or the folded prompt came earlier in the batch.
      unproven: the verifier does not pass the task's own solution, or there is none.
      unjudged: the verifier could not judge the solution.

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
        cases: list[tuple[Task, Completion]] = []
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
                cases.append((task, Completion((), (), task.solution, "stop")))
        verdicts = self._judge(cases) if cases else []
        admitted = []
        for (task, _), verdict in zip(cases, verdicts, strict=True):
            if verdict.outcome is Outcome.PASS:
                admitted.append(task)
            else:
                refused["unproven" if verdict.outcome is Outcome.FAIL else "unjudged"] += 1
        return AdmissionResult(tuple(admitted), dict(refused))
