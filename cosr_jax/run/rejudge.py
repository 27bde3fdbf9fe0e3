"""Judges saved completions again with today's extractor and verifier, and says what changes.

A change of the rules must show what it would have done to the rewards that were trained on.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from cosr_jax.config import VerifierConfig
from cosr_jax.protocols import Verifier
from cosr_jax.types import Completion, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.extraction import EXTRACTOR_VERSION

_BATCH = 256


@dataclasses.dataclass
class Changes:
    """What judging again came to.

    Attributes:
      same: completions whose outcome, category and reward are as they were.
      changed: how many went from one label to another; a label is "pass", "error" or a failure
        category.  Equal labels are a changed reward.
      skipped: rows that cannot be judged again, by reason.
    """

    same: int = 0
    changed: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def run(config: VerifierConfig, source: str | Path, output: str | Path = "") -> int:
    """The command ``cosr rejudge``: judges ``source`` again, prints a table, writes the new rows.

    Args:
      config: the verifier to judge with.
      source: a workdir, or one file of ``samples/``.
      output: the file to write; "" for ``rejudged.jsonl`` in the workdir, or beside the file.

    Returns:
      The exit code, 0.

    Raises:
      UserError: there is nothing to judge, or ``output`` is among what is read.
    """
    from cosr_jax.verifiers.pool import VerifierPool

    source = Path(source)
    files = sample_files(source)
    target = Path(output) if output else _default_output(source)
    if target.resolve() in {file.resolve() for file in files}:
        raise UserError(f"--output={target}: it is what is judged again", "name another file")
    with VerifierPool(config) as verifier:
        changes = rejudge(files, verifier, target)
    show(changes, Console())
    print(f"written to {target}")
    return 0


def sample_files(source: Path) -> list[Path]:
    """The files of saved completions that ``source`` names, in order.

    Raises:
      UserError: there are none.
    """
    if source.is_file():
        return [source]
    files = sorted((source / "samples").glob("*.jsonl"))
    if not files:
        raise UserError(
            f"{source}: holds no saved completions",
            "name a run's folder with samples/*.jsonl, or one such file",
        )
    return files


def _default_output(source: Path) -> Path:
    return source / "rejudged.jsonl" if source.is_dir() else source.with_suffix(".rejudged.jsonl")


def rejudge(files: Iterable[Path], verifier: Verifier, output: Path) -> Changes:
    """Judges every completion in ``files`` again and writes the rows with their new verdicts.

    A row keeps all that it had; its verdict is the new one, and ``before`` has the old one.  The
    output appears whole or not at all.  Rows without a task, from before tasks were saved, and
    lines that a killed run left unfinished are counted and left out.

    Args:
      files: JSON lines as ``run.metrics.SampleLog`` writes them.
      verifier: judges.
      output: the file to write.
    """
    changes = Changes()
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        rows = itertools.chain.from_iterable(_rows(file, changes) for file in files)
        while batch := list(itertools.islice(rows, _BATCH)):
            _judge(batch, verifier, changes, stream)
    partial.replace(output)
    return changes


def _rows(file: Path, changes: Changes) -> Iterator[tuple[dict[str, Any], Task, Completion]]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                row = json.loads(line)
                task = Task.from_dict(row["task"]) if row.get("task") else None
                completion = Completion((), (), row["completion"], row["finish_reason"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                changes.skipped[f"unreadable ({type(error).__name__})"] += 1
                continue
            if task is None:
                changes.skipped["no task saved"] += 1
            else:
                yield row, task, completion


def _judge(
    batch: list[tuple[dict[str, Any], Task, Completion]],
    verifier: Verifier,
    changes: Changes,
    stream: TextIO,
) -> None:
    verdicts = verifier.judge([(task, completion) for _, task, completion in batch])
    for (row, task, _), verdict in zip(batch, verdicts, strict=True):
        before = {name: row.get(name) for name in ("outcome", "reward", "category", "provenance")}
        after = _fields(verdict)
        provenance = f"{task.domain} judge, extractor {EXTRACTOR_VERSION}, rejudged"
        labels = _label(before), _label(after)
        if labels[0] == labels[1] and before["reward"] == after["reward"]:
            changes.same += 1
        else:
            changes.changed[labels] += 1
        stream.write(
            json.dumps({**row, **after, "provenance": provenance, "before": before}) + "\n"
        )


def _fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "outcome": verdict.outcome.value,
        "reward": None if verdict.outcome is Outcome.ERROR else verdict.reward,
        "category": verdict.category,
        "answer": verdict.answer,
        "method": verdict.method,
        "value_correct": verdict.value_correct,
        "is_subjective": verdict.is_subjective,
        "is_left_out": verdict.is_left_out,
        "unanswered": verdict.unanswered,
        "detail": verdict.detail,
    }


def _label(fields: Mapping[str, Any]) -> str:
    return str(fields["category"] or fields["outcome"])


def show(changes: Changes, console: Console) -> None:
    """Prints how many verdicts changed, by category."""
    table = Table("was", "is now", "completions", title="verdicts that change")
    for (old, new), count in sorted(changes.changed.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(old, new, str(count))
    if changes.changed:
        console.print(table)
    judged = changes.same + changes.changed.total()
    console.print(f"{changes.changed.total()} of {judged} verdicts change")
    for reason, count in sorted(changes.skipped.items()):
        console.print(f"{count} rows left out: {reason}")
