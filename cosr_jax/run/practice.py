"""What the student practises on: tasks drawn by plan, sampled, judged, and counted as evidence."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from cosr_jax.protocols import ChatTokenizer, RolloutEngine, TaskSource, Verifier
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.judging import JudgeClock, Judging
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.replay import ReplayBuffer
from cosr_jax.types import (
    AUTHORED,
    CellEvidence,
    FailedSample,
    Outcome,
    Plan,
    RolloutGroup,
    SamplingParams,
    Task,
    UserError,
    Verdict,
)

#: Candidates in a row without a new admissible task after which a mixture counts as exhausted.
#: With one task of 27 left (the smallest cell of the suite) it is overlooked in 1 % of draws.
_PATIENCE = 128
#: Characters of a failed sample that are kept for the curator.
_MOST_TEXT = 8_000


def derive_seed(*names: object) -> int:
    """A 31-bit seed from anything with a stable ``repr``: the same names, the same seed, anywhere.

    Every random choice of a run takes its seed from the run's seed, what it is for, and the step,
    so that a resumed run needs no generator state to go on identically.
    """
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def draw_tasks(
    plan: Plan,
    count: int,
    source: TaskSource,
    replay: ReplayBuffer,
    admission: Admission,
    seed: int,
    fits: Callable[[Task], bool] = lambda task: True,
    least: int | None = None,
) -> list[Task]:
    """``count`` distinct training tasks: authored, replayed, and fresh ones by the plan's mixture.

    Cells are drawn by systematic sampling, so that even a small batch holds each cell nearly in
    proportion to its weight.

    Args:
      plan: its mixture, replay fraction, and authored tasks, which have been admitted before.
      count: how many tasks.
      source: of fresh tasks.
      replay: past tasks.
      admission: what fresh tasks must pass.
      seed: of every draw.
      fits: tasks for which it is False are passed over, e.g. when a worked solution is too long.
      least: tasks that will do where there are not ``count``; None: no fewer.

    Raises:
      UserError: the mixture's cells do not yield enough admissible tasks.
    """
    rng = np.random.default_rng(seed)
    reviewed = filter(fits, replay.draw(round(plan.replay_fraction * count), rng))
    chosen = {task.key: task for task in reviewed}
    written = [task for task in plan.authored if task.key not in chosen and fits(task)]
    wanted = min(round(plan.authored_share * count), len(written), count - len(chosen))
    if wanted > 0:  # a plan without authored tasks draws the same numbers as ever
        picked = rng.permutation(len(written))[:wanted]
        chosen |= {written[i].key: written[i] for i in picked}
    cells = [cell for cell, _ in plan.mixture]
    edges = np.cumsum([weight for _, weight in plan.mixture])
    fruitless = 0
    while (missing := count - len(chosen)) and fruitless < _PATIENCE:
        marks = (rng.random() + np.arange(missing)) / missing * edges[-1]
        picks = np.minimum(np.searchsorted(edges, marks, side="right"), len(cells) - 1)
        candidates = [source.draw(cells[i], int(rng.integers(2**31)), "train") for i in picks]
        fresh = [task for task in candidates if task.key not in chosen and fits(task)]
        admitted = admission.admit(fresh).tasks
        chosen |= {task.key: task for task in admitted}
        fruitless = 0 if admitted else fruitless + missing
    if len(chosen) < (count if least is None else least):
        raise UserError(
            f"cells {', '.join(cells)} yield {len(chosen)} distinct tasks of {count} wanted",
            "widen config.curator.focus, lower config.rollout.prompts_per_step and "
            "config.sft.batch_size, or raise config.rollout.max_new_tokens",
        )
    return list(chosen.values())


def sample_groups(
    tasks: Sequence[Task],
    num_generations: int,
    sampling: SamplingParams,
    engine: RolloutEngine,
    tokenizer: ChatTokenizer,
    verifier: Verifier,
    seed: int,
    adapter: Adapter | None = None,
    clock: JudgeClock | None = None,
) -> list[RolloutGroup]:
    """Answers each task ``num_generations`` times and judges every answer.

    A group is judged as soon as it is complete, while others are still decoded.  With an
    ``adapter`` its verdicts count, and ``clock`` measures the judging.
    """
    size = num_generations
    prompts = [tokenizer.encode_prompt(task.prompt) for task in tasks]
    with Judging(verifier, tasks, size, clock or JudgeClock()) as judging:
        completions = engine.generate(prompts, size, sampling, seed, judging.note)
        verdicts = [verdict for group in judging.verdicts(completions) for verdict in group]
    groups = [
        RolloutGroup(task, tuple(prompt), group)
        for task, prompt, group in zip(tasks, prompts, completions, strict=True)
    ]
    if adapter is not None:
        cases = [(group.task, completion) for group in groups for completion in group.completions]
        verdicts = adapter.adapt(cases, verdicts)
    return [g.judged(verdicts[i * size : (i + 1) * size]) for i, g in enumerate(groups)]


def count_evidence(groups: Sequence[RolloutGroup], accept: Sequence[str]) -> list[CellEvidence]:
    """Evidence by cell, in the cells' sorted order; ERROR verdicts count for nothing.

    Nor do authored tasks: they are not of the kind that their cell is measured by.

    Args:
      groups: judged groups.
      accept: forms of final answers that count as formatted (``config.verifier.accept``).
    """
    totals: dict[str, CellEvidence] = {}
    for group in groups:
        if group.task.source == AUTHORED:
            continue
        judged = [v for v in group.verdicts if v.outcome is not Outcome.ERROR]
        evidence = CellEvidence(
            cell=group.task.cell,
            samples=len(judged),
            passed=sum(v.outcome is Outcome.PASS for v in judged),
            value_correct=sum(v.value_correct for v in judged),
            formatted=sum(is_formatted(group.task, v, accept) for v in judged),
            groups=int(bool(judged)),
            informative_groups=int(group.is_informative),
        )
        known = totals.get(evidence.cell)
        totals[evidence.cell] = evidence if known is None else known + evidence
    return [totals[cell] for cell in sorted(totals)]


def merge_evidence(evidence: list[CellEvidence]) -> list[CellEvidence]:
    """One entry a cell, in the cells' sorted order."""
    totals: dict[str, CellEvidence] = {}
    for item in evidence:
        totals[item.cell] = totals[item.cell] + item if item.cell in totals else item
    return [totals[cell] for cell in sorted(totals)]


def failed_samples(groups: Sequence[RolloutGroup]) -> list[FailedSample]:
    """The wrong answers of ``groups``, in order, for the curator."""
    return [
        FailedSample(
            group.task, completion.text[:_MOST_TEXT], dataclasses.replace(verdict, seconds=0.0)
        )
        for group in groups
        for completion, verdict in zip(group.completions, group.verdicts, strict=True)
        if verdict.outcome is Outcome.FAIL
    ]


def is_formatted(task: Task, verdict: Verdict, accept: Sequence[str]) -> bool:
    """Whether the answer has the form that its domain asks for, right or wrong.

    A final answer of maths has to be given in a form of ``accept``; elsewhere the judges name a
    method only for what was given in the right form.
    """
    return verdict.method in accept if task.domain == "math" else verdict.method != ""
