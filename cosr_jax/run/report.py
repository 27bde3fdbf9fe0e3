"""The end of a run in three forms: report.json for programs, report.md and the terminal for people.

``report.json`` has ``"schema": 1``; accuracies are fractions in [0, 1], and what was not measured
is null.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from cosr_jax.run.curator_story import chain_parts, checklist_parts, quote
from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.run.manifest import replace_file
from cosr_jax.run.statistics import Gain, paired_bootstrap, wilson_interval
from cosr_jax.types import CodeChecks, Domain, Task

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Proportion:
    """``successes`` of ``n`` tasks."""

    successes: int
    n: int

    @property
    def rate(self) -> float | None:
        """In [0, 1]; None of no task."""
        return self.successes / self.n if self.n else None

    @property
    def ci95(self) -> Interval:
        """Wilson's 95 % interval."""
        return wilson_interval(self.successes, self.n)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracy on the same tasks before and after training; only after, for a mere measurement."""

    after: Proportion
    before: Proportion | None = None
    gain: Gain | None = None  # with its paired-bootstrap 95 % interval

    @classmethod
    def of(
        cls,
        before: Sequence[bool] | None,
        after: Sequence[bool],
        resamples: int = 2000,
        seed: int = 0,
    ) -> Comparison:
        """Compares right answers, bool [n] on each side, task by task."""
        now = Proportion(sum(map(bool, after)), len(after))
        if before is None:
            return cls(now)
        then = Proportion(sum(map(bool, before)), len(before))
        gain = paired_bootstrap(before, after, resamples, seed) if now.n else None
        return cls(now, then, gain)

    def rates(self) -> dict[str, Any]:
        """{"before", "after"} as fractions or None."""
        return {"before": self.before and self.before.rate, "after": self.after.rate}

    def to_json(self) -> dict[str, Any]:
        """``rates`` with "gain" and "gain_ci95" ([low, high])."""
        gain = self.gain
        return {
            **self.rates(),
            "gain": gain and gain.gain,
            "gain_ci95": gain and [gain.low, gain.high],
        }


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """One probe set: overall, form forgiven, per skill and per cell.

    Only tasks with a verdict on every measured side count; ``unjudged`` are the others.
    """

    name: str
    sha256: str  # of the probe set
    strict: Comparison
    lenient: Comparison  # right value, whatever its form
    skills: Mapping[str, Comparison]
    cells: Mapping[str, Comparison]
    domains: Mapping[str, Comparison]
    categories: Mapping[str, int]  # failures after training, by category
    domain_categories: Mapping[str, Mapping[str, int]]  # the same within each domain
    unjudged: int = 0
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # e.g. {"pass_at_8": 0.9}

    @classmethod
    def of(
        cls,
        name: str,
        sha256: str,
        tasks: Sequence[Task],
        before: ProbeResult | None,
        after: ProbeResult,
        resamples: int = 2000,
        seed: int = 0,
        extra: Mapping[str, float] | None = None,
    ) -> SuiteResult:
        """Compares two measurements of ``tasks`` (all sequences in the tasks' order).

        Raises:
          ValueError: a measurement is not of ``tasks``: the numbers differ.
        """
        for side in (before, after):
            if side is not None and len(side.judged) != len(tasks):
                raise ValueError(f"{name}: {len(side.judged)} answers to {len(tasks)} tasks")
        judged = np.array(after.judged, dtype=bool)
        if before is not None:
            judged &= np.array(before.judged, dtype=bool)

        def compare(field: str, member: np.ndarray) -> Comparison:
            old = None if before is None else np.array(getattr(before, field), dtype=bool)[member]
            new = np.array(getattr(after, field), dtype=bool)[member]
            return Comparison.of(old, new, resamples, seed)

        def split(label: Callable[[Task], str]) -> dict[str, Comparison]:
            labels = np.array([label(task) for task in tasks])
            return {
                value: compare("strict", judged & (labels == value))
                for value in sorted(set(labels.tolist()))
            }

        def failures(member: np.ndarray) -> dict[str, int]:
            failed = (c for c, is_in in zip(after.categories, member, strict=True) if c and is_in)
            return dict(collections.Counter(failed).most_common())

        domain = np.array([task.domain for task in tasks])
        domains = split(lambda task: task.domain)
        return cls(
            name=name,
            sha256=sha256,
            strict=compare("strict", judged),
            lenient=compare("lenient", judged),
            skills=split(lambda task: task.skill),
            cells=split(lambda task: task.cell),
            domains=domains,
            categories=failures(judged),
            domain_categories={name: failures(judged & (domain == name)) for name in domains},
            unjudged=int((~judged).sum()),
            extra=dict(extra or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """The suite's entry under "probes"."""

        def each(parts: Mapping[str, Comparison]) -> dict[str, Any]:
            return {name: {"n": c.after.n, **c.rates()} for name, c in parts.items()}

        return {
            "sha256": self.sha256,
            "n": self.strict.after.n,
            **self.strict.to_json(),
            "lenient": self.lenient.to_json(),
            "skills": each(self.skills),
            "cells": each(self.cells),
            "domains": {
                name: {**entry, "categories": dict(self.domain_categories[name])}
                for name, entry in each(self.domains).items()
            },
            "categories": dict(self.categories),
            "unjudged": self.unjudged,
            **self.extra,
        }


@dataclasses.dataclass(frozen=True)
class StrategyRecord:
    """One round: what the curator decided, on which grounds, and what came of it."""

    round: int
    strategy: str
    context: str
    reason: str
    gain: float | None  # change of validation accuracy; None: the round was not measured


@dataclasses.dataclass(frozen=True)
class Best:
    """The kept checkpoint's score on the validation tasks.

    It is the highest of several noisy scores, hence optimistic; the test suites are not.
    """

    step: int
    score: Proportion


@dataclasses.dataclass(frozen=True)
class SolvedExample:
    """One test task that the student failed before and solves now."""

    suite: str
    prompt: str
    expected: str  # the answer; of code the tests; "" where the domain has neither
    before: str
    after: str
    domain: Domain = "math"

    @classmethod
    def find(
        cls, suite: str, tasks: Sequence[Task], before: ProbeResult, after: ProbeResult
    ) -> SolvedExample | None:
        """A failure now solved; preferably one whose very value was wrong, not just its form."""
        solved = [
            i
            for i, passed in enumerate(after.strict)
            if passed and before.judged[i] and not before.strict[i]
        ]
        if not solved:
            return None
        i = min(solved, key=lambda i: before.lenient[i])
        task, expected = tasks[i], tasks[i].answer
        if isinstance(task.checks, CodeChecks):
            expected = "\n".join(task.checks.tests)
        return cls(suite, task.prompt, expected, before.answers[i], after.answers[i], task.domain)


@dataclasses.dataclass(frozen=True)
class RunReport:
    """Everything the reports tell."""

    status: Literal["converged", "completed", "stopped", "no_signal"]
    reason: str  # why it stopped, in words with numbers
    seed: int
    steps: int  # optimizer steps
    rounds: int
    wall_s: float  # of all sessions of the run
    generated_tokens: int
    versions: Mapping[str, str]
    config_hash: str
    suites: tuple[SuiteResult, ...]
    strategies: tuple[StrategyRecord, ...] = ()
    best: Best | None = None
    solved: SolvedExample | None = None
    chains: tuple[Mapping[str, Any], ...] = ()  # how failures led to tasks, see ``Curator.chains``
    curator: Mapping[str, float] = dataclasses.field(default_factory=dict)  # its final figures
    checklist: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of its checker
    commands: tuple[tuple[str, str], ...] = ()  # (what for, command), see ``next_commands``

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        best = self.best
        return {
            "schema": 1,
            "status": self.status,
            "reason": self.reason,
            "seed": self.seed,
            "steps": self.steps,
            "rounds": self.rounds,
            "wall_s": self.wall_s,
            "generated_tokens": self.generated_tokens,
            "versions": dict(self.versions),
            "config_hash": self.config_hash,
            "probes": {suite.name: suite.to_json() for suite in self.suites},
            "strategies": [dataclasses.asdict(record) for record in self.strategies],
            "best": best
            and {"step": best.step, "score": best.score.rate, "ci95": list(best.score.ci95)},
            **(
                {"curator": {"figures": dict(self.curator), "chains": list(self.chains)}}
                if self.chains
                else {}
            ),
            **({"checklist": dict(self.checklist)} if self.checklist else {}),
        }


def next_commands(
    workdir: str | os.PathLike[str], train_args: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """What to do after training, as (what for, shell command).

    Args:
      workdir: the run's folder, as the user wrote it.
      train_args: the arguments of this ``cosr train`` after "train".
    """
    folder, train = shlex.quote(str(workdir)), shlex.join(["cosr", "train", *train_args])
    return (
        ("watch the curves", f"tensorboard --logdir {folder}/tensorboard"),
        ("resume, or do nothing if it is done", train),
        (
            "go on for longer, with another setting",
            f"{train} --config.train.max_rounds=40 --allow_config_change",
        ),
        ("measure again", f"cosr eval --workdir={folder}"),
        ("export the adapter for PEFT", f"cosr export --workdir={folder} --format=peft"),
        ("export merged weights", f"cosr export --workdir={folder} --format=merged"),
    )


def write_report(workdir: str | os.PathLike[str], report: RunReport) -> None:
    """Writes report.json and report.md into ``workdir``, each of them whole or not at all.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    root = Path(workdir)
    content = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(root / "report.json", content + "\n")
    replace_file(root / "report.md", render_markdown(report))


def render_markdown(report: RunReport) -> str:
    """The report for people, as Markdown."""
    parts = [_headline(report), "## Accuracy on held-out tasks", _accuracy_table(report)]
    parts += [_small_print(report)]
    if report.strategies:
        rows = [
            (str(r.round), r.strategy, _points(r.gain), r.context, r.reason)
            for r in report.strategies
        ]
        parts += [
            "## What the curator decided",
            "Gain is the change of validation accuracy that followed, in percentage points.",
            _table(("round", "strategy", "gain", "context", "why"), rows, right={0, 2}),
        ]
    if report.chains:
        parts += chain_parts(report.chains, report.curator)
    if report.checklist:
        parts += checklist_parts(report.checklist)
    if report.solved is not None:
        s = report.solved
        is_short = s.domain == "math"
        parts += [
            f"## A failure now solved ({s.suite})",
            f"Asked{f' (expected `{s.expected}`)' if is_short else ''}:\n\n{quote(s.prompt)}",
            *([] if is_short or not s.expected else [f"Tests:\n\n{quote(s.expected)}"]),
            f"Before:\n\n{quote(s.before)}",
            f"After:\n\n{quote(s.after)}",
        ]
    if report.commands:
        lines = [f"# {purpose}\n{command}" for purpose, command in report.commands]
        parts += ["## Next", "```sh\n" + "\n\n".join(lines) + "\n```"]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts += [
        "## To reproduce",
        f"Seed {report.seed}, config {report.config_hash[:12]}, {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def render_terminal(report: RunReport, file: IO[str] | None = None) -> None:
    """Prints the report's core to ``file`` (stdout): a coloured table, plain off a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, soft_wrap=True)
    console.print(Text(_status_line(report)))
    header, *rows = _accuracy_rows(report)
    if console.is_terminal:
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table, soft_wrap=False)
    else:
        for row in rows:
            named = (f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True))
            console.print(Text(f"{row[0]}: {', '.join(named)}"))
    if report.solved is not None:
        s = report.solved
        for label, text in (("solved now", s.prompt), ("before", s.before), ("after", s.after)):
            shown = _one_line(text) if s.domain == "math" else _block(text)
            console.print(Text(f"{label}: {shown}"))
    for purpose, command in report.commands:
        console.print(Text(f"{purpose}: {command}"))


def _status_line(report: RunReport) -> str:
    return f"{report.status}: {report.reason}" if report.reason else report.status


def _headline(report: RunReport) -> str:
    minutes, seconds = divmod(round(report.wall_s), 60)
    lines = [f"# Run report: {report.status}"]
    if report.reason:
        lines.append(f"Why it stopped: {report.reason}.")
    facts = (
        f"{report.steps} optimizer steps in {report.rounds} rounds, "
        f"{report.generated_tokens:,} generated tokens, {minutes} min {seconds:02d} s."
    )
    if report.best is not None:
        facts += (
            f" The kept checkpoint is that of step {report.best.step}: "
            f"{_share(report.best.score)} on the validation tasks."
        )
    return "\n\n".join([*lines, facts])


def _accuracy_rows(report: RunReport) -> list[tuple[str, ...]]:
    """Header and rows: per suite overall, form forgiven, and its skills (or levels) if several."""
    rows: list[tuple[str, ...]] = [("suite", "tasks", "before", "after", "gain")]
    for suite in report.suites:
        parts = [(suite.name, suite.strict), (f"{suite.name}, form forgiven", suite.lenient)]
        if len(suite.domains) > 1:
            parts += [(f"{suite.name}: all of {name}", c) for name, c in suite.domains.items()]
        detail = suite.skills if len(suite.skills) > 1 else suite.cells
        if len(detail) > 1:
            parts += [(f"{suite.name}: {name}", c) for name, c in detail.items()]
        for label, part in parts:
            rows.append(
                (
                    label,
                    str(part.after.n),
                    "-" if part.before is None else _share(part.before),
                    _share(part.after),
                    "-" if part.gain is None else _gain(part.gain),
                )
            )
    return rows


def _accuracy_table(report: RunReport) -> str:
    header, *rows = _accuracy_rows(report)
    return _table(header, rows, right={1, 2, 3, 4})


def _small_print(report: RunReport) -> str:
    lines = [
        "Ranges are 95 % intervals: Wilson's for each side, the paired bootstrap's over tasks for "
        "gains (percentage points). One greedy answer per task."
    ]
    for suite in report.suites:
        if suite.unjudged:
            lines.append(f"{suite.name}: {suite.unjudged} tasks left out for lack of a verdict.")
        of_domain = suite.domain_categories if len(suite.domains) > 1 else {"": suite.categories}
        for domain, categories in of_domain.items():
            if categories:
                counts = ", ".join(f"{name} {count}" for name, count in categories.items())
                where = f" in {domain}" if domain else ""
                lines.append(f"{suite.name}, what still fails{where}: {counts}.")
        if suite.extra:
            lines.append(
                f"{suite.name}: " + ", ".join(f"{k} {v:.1%}" for k, v in suite.extra.items()) + "."
            )
    return "\n\n".join(lines)


def _share(part: Proportion) -> str:
    if part.rate is None:
        return "-"
    low, high = part.ci95
    return f"{part.rate:.1%} [{low * 100:.1f}, {high * 100:.1f}]"


def _gain(gain: Gain) -> str:
    return f"{gain.gain * 100:+.1f} [{gain.low * 100:+.1f}, {gain.high * 100:+.1f}]"


def _points(gain: float | None) -> str:
    return "-" if gain is None else f"{gain * 100:+.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> str:
    rule = ("---:" if i in right else "---" for i in range(len(header)))
    cells = [[" ".join(c.replace("|", "\\|").split()) for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), list(rule), *cells])


def _one_line(text: str) -> str:
    """Student text for a terminal: no line break and no control sequence of its own."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def _block(text: str) -> str:
    """Code of the student's for a terminal: its lines, each without control sequences."""
    return "".join(
        "\n    " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line.expandtabs(4))
        for line in text.split("\n")
    )
