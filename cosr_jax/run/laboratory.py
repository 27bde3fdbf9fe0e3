"""Where a curator checks its beliefs during one round of planning; see ``protocols.Lab``."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cosr_jax.protocols import ChatTokenizer, TaskSource, Verifier
from cosr_jax.run.practice import derive_seed
from cosr_jax.tasks.admission import Admission
from cosr_jax.types import AdmissionResult, Completion, RolloutGroup, Task, Verdict

#: Draws without a new task, per task wanted, after which a cell counts as exhausted.
_PATIENCE = 20


class Laboratory:
    """One round's lab: equal calls in equal order have equal results.

    Args:
      seed: of the run.
      round_: number of the round that is planned.
      source: of fresh training tasks.
      admission: what authored tasks must pass.
      known: tasks that authored ones must not repeat.
      sample: (tasks, generations, seed) -> judged groups of the student as it is.
      verifier: judges.
      chat: tells which prompts are too long.
      max_prompt_tokens: longest prompt that the student is asked.
    """

    def __init__(
        self,
        seed: int,
        round_: int,
        source: TaskSource,
        admission: Admission,
        known: Iterable[Task],
        sample: Callable[[list[Task], int, int], list[RolloutGroup]],
        verifier: Verifier,
        chat: ChatTokenizer,
        max_prompt_tokens: int,
    ):
        self._seed, self._round, self._calls = seed, round_, 0
        self._source, self._admission, self._known = source, admission, list(known)
        self._sample, self._verifier = sample, verifier
        self._chat, self._max_prompt_tokens = chat, max_prompt_tokens
        self.admitted: set[str] = set()  # ids of authored tasks that passed
        self._drawn: dict[str, str] = {}  # id -> prompt of the tasks that this lab drew

    def _next_seed(self) -> int:
        self._calls += 1
        return derive_seed(self._seed, "lab", self._round, self._calls)

    def draw(self, cell: str, count: int) -> list[Task]:
        """Distinct fresh training tasks of a cell; fewer where it holds fewer."""
        rng = np.random.default_rng(self._next_seed())
        tasks: dict[str, Task] = {}
        for _ in range(_PATIENCE * count):
            if len(tasks) == count:
                break
            task = self._source.draw(cell, int(rng.integers(2**31)), "train")
            tasks.setdefault(task.key, task)
        self._drawn |= {task.task_id: task.prompt for task in tasks.values()}
        return list(tasks.values())

    def sample(self, tasks: Sequence[Task], num_generations: int) -> list[RolloutGroup]:
        """The student's answers to each task, judged."""
        return self._sample(list(tasks), num_generations, self._next_seed()) if tasks else []

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        """One verdict for each case, in order."""
        return self._verifier.judge(cases)

    def admit(self, tasks: Sequence[Task]) -> AdmissionResult:
        """Sorts authored tasks; a prompt over the student's limit is refused as "too_long".

        Tasks that this lab drew, with other solutions, only have to prove those.
        """
        drawn = [task for task in tasks if self._drawn.get(task.task_id) == task.prompt]
        written = [task for task in tasks if self._drawn.get(task.task_id) != task.prompt]
        proven = self._admission.admit(drawn)
        result = self._admission.admit_authored(written, self._known)
        result = AdmissionResult(
            (*proven.tasks, *result.tasks),
            collections.Counter(proven.refused) + collections.Counter(result.refused),
        )
        fitting = tuple(
            task
            for task in result.tasks
            if len(self._chat.encode_prompt(task.prompt)) <= self._max_prompt_tokens
        )
        refused = dict(result.refused)
        if len(fitting) < len(result.tasks):
            refused["too_long"] = len(result.tasks) - len(fitting)
        self._known += fitting
        self.admitted |= {task.task_id for task in fitting}
        return AdmissionResult(fitting, refused)
