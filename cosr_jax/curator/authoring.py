"""Tasks against a weakness: written by a model, proven by the verifier, measured on the student."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.config import CuratorConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.analysis import as_failure
from cosr_jax.curator.audit import Finding
from cosr_jax.curator.client import Client
from cosr_jax.curator.consult import consult
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.proving import as_task
from cosr_jax.curator.schemas import Context
from cosr_jax.protocols import Lab
from cosr_jax.types import (
    AUTHORED,
    FailedSample,
    Outcome,
    RolloutGroup,
    Task,
    level_difficulty,
)

#: Fewer tasks than this are not worth a round of their own.
FEWEST = 2


@dataclasses.dataclass(frozen=True)
class Authored:
    """What came of an order of tasks."""

    tasks: tuple[Task, ...]  # fit for training, with their measured difficulty
    rates: Mapping[str, float]  # task_id -> the student's pass rate, of all admitted tasks
    written: int  # tasks in the answer
    refused: Mapping[str, int]  # by reason: of the parser, of admission, and "zone"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values, for logs."""
        shown = [
            {
                "id": t.task_id,
                "prompt": t.prompt,
                "answer": t.answer,
                "pass_rate": self.rates[t.task_id],
            }
            for t in self.tasks
        ]
        return {"written": self.written, "refused": dict(self.refused), "kept": shown}


def write_tasks(
    client: Client,
    form: str,
    finding: Finding,
    failures: Sequence[FailedSample],
    count: int,
    difficulty: float,
    cells: Sequence[str],
    lab: Lab,
    config: CuratorConfig,
    seed: int,
) -> Authored:
    """Orders ``count`` tasks against an accepted weakness and keeps those that teach something.

    A task is kept if the parser takes it (its reference proves itself), admission lets it in, and
    the student passes it at a rate within ``[zone_low, zone_high]``; worked solutions, which are
    imitated, may also be of tasks that the student never solves.

    Args:
      client: asks.
      form: one of ``prompts.FORMS``.
      finding: the weakness.
      failures: of the batch; those that it cites are shown as examples.
      count: tasks wanted.
      difficulty: of most tasks, in [0, 1].
      cells: the whole grid.
      lab: judges, admits and samples.
      config: zone, and ``llm``.
      seed: of the choice of examples.

    Raises:
      CallError: no model gave a usable answer.
    """
    weakness = finding.weakness
    cited = set(weakness.evidence_task_ids)
    examples = [f for f in failures if f.task.task_id in cited and f.task.skill == weakness.skill]
    context = Context(known_skills=[weakness.skill], max_items=count)
    shown = [as_failure(example) for example in examples]
    build = functools.partial(
        _build, form, weakness.to_dict(), shown, count, difficulty, context, seed
    )
    result = consult(client, build, config.llm.prompt_tokens, lab.judge)
    assert result.value is not None, "the client accepts no answer without a value"
    refused: collections.Counter[str] = collections.Counter(result.reasons)
    candidates = [_boxed(as_task(item)) for item in result.value["tasks"]]
    written = len(candidates) + result.dropped
    domains = {example.task.domain for example in examples}
    fitting = [task for task in candidates if task.domain in domains]
    refused["domain"] += len(candidates) - len(fitting)
    admitted = lab.admit(fitting)
    refused.update(admitted.refused)
    groups = lab.sample(admitted.tasks, config.llm.task_samples)
    rates = {group.task.task_id: rate for group in groups if (rate := _rate(group)) is not None}
    refused["unjudged"] += len(groups) - len(rates)
    low = 0.0 if form == "worked" else config.zone_low
    kept = []
    for task in admitted.tasks:
        rate = rates.get(task.task_id)
        if rate is not None and low <= rate <= config.zone_high:
            kept.append(dataclasses.replace(task, difficulty=_difficulty(task.skill, rate, cells)))
        elif rate is not None:
            refused["zone"] += 1
    return Authored(tuple(kept), rates, written, dict(sorted((+refused).items())))


def _build(
    form: str,
    weakness: Mapping[str, Any],
    examples: Sequence[Failure],
    count: int,
    difficulty: float,
    context: Context,
    seed: int,
    max_tokens: int,
) -> prompts.Prompt:
    return prompts.author(form, weakness, examples, count, difficulty, context, max_tokens, seed)


def _boxed(task: Task) -> Task:
    """The task with its worked solution in the form that the student is to learn."""
    solution = task.solution
    if task.domain == "math" and "\\boxed" not in solution:
        solution = f"{solution.rstrip()} \\boxed{{{task.answer}}}"
    return dataclasses.replace(task, solution=solution, source=AUTHORED)


def _rate(group: RolloutGroup) -> float | None:
    """The student's pass rate; None if nothing could be judged."""
    judged = [v for v in group.verdicts if v.outcome is not Outcome.ERROR]
    return sum(v.outcome is Outcome.PASS for v in judged) / len(judged) if judged else None


def _difficulty(skill: str, rate: float, cells: Sequence[str]) -> float:
    """The difficulty of the skill's level that is nearest to what was measured, 1 - ``rate``."""
    levels = [int(cell.rpartition("/")[2]) for cell in cells if cell.rpartition("/")[0] == skill]
    return min(map(level_difficulty, levels), key=lambda value: (abs(value - (1.0 - rate)), value))
