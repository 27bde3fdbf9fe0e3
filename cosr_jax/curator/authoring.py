"""Tasks against a weakness: written by a model, proven by the verifier, measured on the student."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.config import CuratorConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.analysis import as_failure
from cosr_jax.curator.audit import Finding
from cosr_jax.curator.calls import Complaint, Question, Reply
from cosr_jax.curator.client import Client
from cosr_jax.curator.consult import consult
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.proving import Judge, as_task
from cosr_jax.curator.schemas import Context
from cosr_jax.protocols import Lab
from cosr_jax.types import (
    AUTHORED,
    CodeChecks,
    Completion,
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
    imitated, may also be of tasks that the student never solves.  If the role checker has a model
    of its own, that has to come to the reference's answer.  Pairs must be ``contrasting``,
    sequences ``falling``, steps ``leading``.

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
    counsel = consult(client, build, config.llm.prompt_tokens, lab.judge)
    result = counsel.result
    assert result.value is not None, "the client accepts no answer without a value"
    refused: collections.Counter[str] = collections.Counter(result.reasons)
    candidates = [_boxed(as_task(item)) for item in result.value["tasks"]]
    written = len(candidates) + result.dropped
    lost = {drop.index for drop in result.drops}
    place = {
        task.task_id: index
        for task, index in zip(
            candidates, (i for i in range(written) if i not in lost), strict=True
        )
    }  # in the order that the author gave them
    domains = {example.task.domain for example in examples}
    fitting = [task for task in candidates if task.domain in domains]
    refused["domain"] += len(candidates) - len(fitting)
    admitted = lab.admit(fitting)
    refused.update(admitted.refused)
    agreed = _checked(client, counsel.endpoint, admitted.tasks, lab)
    refused["disputed"] += len(admitted.tasks) - len(agreed)
    groups = lab.sample(agreed, config.llm.task_samples)
    rates = {group.task.task_id: rate for group in groups if (rate := _rate(group)) is not None}
    refused["unjudged"] += len(groups) - len(rates)
    judged = [task for task in agreed if task.task_id in rates]
    low = 0.0 if form == "worked" else config.zone_low
    inside = [task for task in judged if low <= rates[task.task_id] <= config.zone_high]
    refused["zone"] += len(judged) - len(inside)
    kept = inside
    if form == "contrastive":
        kept = contrasting(inside, place, lab.judge)
        refused["no_contrast"] += len(inside) - len(kept)
    elif form == "progressive":
        kept = falling(inside, rates)
        refused["no_progress"] += len(inside) - len(kept)
    elif form == "decomposition":
        kept = leading(inside, [example.task for example in examples], lab.judge)
        refused["no_lead"] += len(inside) - len(kept)
    tasks = tuple(
        dataclasses.replace(task, difficulty=_difficulty(task.skill, rates[task.task_id], cells))
        for task in kept
    )
    return Authored(tasks, rates, written, dict(sorted((+refused).items())))


def contrasting(tasks: Sequence[Task], place: Mapping[str, int], judge: Judge) -> list[Task]:
    """The whole pairs: prompts that differ in one place, and solutions that cannot be exchanged.

    Args:
      tasks: in the author's order.
      place: task_id -> where the author put it; the first two are a pair, and so on.
      judge: the verifier.
    """
    pairs: dict[int, list[Task]] = {}
    for task in tasks:
        pairs.setdefault(place[task.task_id] // 2, []).append(task)
    whole = [pair for pair in pairs.values() if len(pair) == 2 and _differences(*pair) == 1]
    exchanged = [
        (task, Completion((), (), other.solution, "stop"))
        for one, two in whole
        for task, other in ((one, two), (two, one))
    ]
    verdicts = judge(exchanged) if exchanged else []
    return [
        task
        for number, pair in enumerate(whole)
        if all(v.outcome is Outcome.FAIL for v in verdicts[2 * number : 2 * number + 2])
        for task in pair
    ]


def falling(tasks: Sequence[Task], rates: Mapping[str, float]) -> list[Task]:
    """The longest part of a sequence along which the measured pass rate never rises.

    Nothing if the rate does not fall at all: that is no progression.
    """
    best: list[list[Task]] = []  # the longest such part that ends with each task
    for task in tasks:
        rate = rates[task.task_id]
        before = [part for part in best if rates[part[-1].task_id] >= rate]
        best.append([*max(before, key=len, default=[]), task])
    longest = max(best, key=len, default=[])
    if not longest or rates[longest[0].task_id] == rates[longest[-1].task_id]:
        return []
    return longest


def leading(steps: Sequence[Task], parents: Sequence[Task], judge: Judge) -> list[Task]:
    """The steps that lead to a parent: what each comes to is needed by a later one.

    The last one's solution has to solve a parent; a step's answer, or the function that it asks
    for, has to stand in the prompt or the solution of a later step that is kept.  Nothing if fewer
    than two are left.

    Args:
      steps: in the author's order.
      parents: failed tasks that the author was shown.
      judge: the verifier.
    """
    if len(steps) < 2 or not parents:
        return []
    last = steps[-1]
    solved = [(parent, Completion((), (), last.solution, "stop")) for parent in parents]
    if not any(verdict.outcome is Outcome.PASS for verdict in judge(solved)):
        return []
    kept = [last]
    for step in reversed(steps[:-1]):
        result = step.checks.entry_point if isinstance(step.checks, CodeChecks) else step.answer
        pattern = re.compile(rf"(?<![\w.]){re.escape(result)}(?![\w.]*\w)")
        if any(pattern.search(f"{later.prompt}\n{later.solution}") for later in kept):
            kept.insert(0, step)
    return kept if len(kept) > 1 else []


def _differences(one: Task, other: Task) -> int:
    """Places in which two prompts differ, a place being a run of words."""
    words = (one.prompt.split(), other.prompt.split())
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    return sum(tag != "equal" for tag, *_ in matcher.get_opcodes())


def _checked(client: Client, author: str, tasks: Sequence[Task], lab: Lab) -> list[Task]:
    """The tasks whose reference another teacher agrees with, where there is another one.

    A task that nobody could be asked about stays: it has proven itself otherwise.

    Args:
      client: asks.
      author: name of the endpoint that wrote them.
      tasks: admitted ones.
      lab: judges.
    """
    others = tuple(e.name for e in client.routes["checker"] if e.name != author)
    if not others or not tasks:
        return list(tasks)
    questions = [
        Question(prompts.checker(task), functools.partial(_solves, task), endpoints=others)
        for task in tasks
    ]
    answers = [
        (task, Completion((), (), answer.content or "", "stop"))
        for task, answer in zip(tasks, client.ask_all(questions), strict=True)
        if isinstance(answer, Reply)
    ]
    verdicts = lab.judge(answers) if answers else []
    disputed = {
        task.task_id
        for (task, _), verdict in zip(answers, verdicts, strict=True)
        if verdict.outcome is Outcome.FAIL and not verdict.value_correct
    }
    return [task for task in tasks if task.task_id not in disputed]


def _solves(task: Task, reply: Reply) -> Complaint | None:
    """Complains about an answer that solves nothing: who babbles or refuses disputes nothing."""
    mark = "\\boxed" if task.domain == "math" else "```"
    is_one = mark in (reply.content or "") or "\\boxed{none}" in (reply.content or "")
    return None if is_one else Complaint("schema", f"it gives no answer in {mark}")


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
