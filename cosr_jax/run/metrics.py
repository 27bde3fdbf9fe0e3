"""What a run leaves behind while it runs: TensorBoard events, metrics.jsonl and samples/.

Namespaces are train/ reward/ completions/ curriculum/ curator/ verifier/ eval/ perf/; leaf names
are those of TRL's GRPOTrainer where the meaning is the same (frac_reward_zero_std, clipped_ratio,
clip_ratio/*, kl, entropy).  Only perf/ and verifier/pool/ may hold what the machine measured (and
curator/llm/ and curator/checklist/, while live models answer), so that everything else can be
compared bit for bit between runs.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX import summary as tb
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from cosr_jax.run import figures
from cosr_jax.types import Outcome, RolloutGroup, UserError

NAMESPACES = ("train", "reward", "completions", "curriculum", "curator", "verifier", "eval", "perf")

#: The custom-scalars page: {category: {chart: (kind, regular expressions of tags)}}.
OVERVIEW = {
    "overview": {
        "accuracy on held-out probes": ("Multiline", [r"eval/.*"]),
        "reward": ("Multiline", [r"reward/mean$"]),
        "groups without signal": ("Multiline", [r"reward/frac_reward_zero_std$"]),
        "completions cut by the length limit": ("Multiline", [r"completions/clipped_ratio$"]),
        "entropy": ("Multiline", [r"train/entropy$"]),
        "loss": ("Multiline", [r"train/loss$"]),
        "verifier errors": ("Multiline", [r"verifier/error_rate$"]),
    }
}

#: Longer texts are cut in TensorBoard's table; samples/ has them whole.
_MAX_TEXT = 1500


def overlap(what: str, busy_s: float, waited_s: float) -> dict[str, float]:
    """Figures for perf/ of work that ran beside other work; none where there was none of it.

    Args:
      what: the work, for the names.
      busy_s: seconds that it was under way.
      waited_s: seconds that nothing else was.
    """
    if busy_s <= 0:
        return {}
    hidden = max(0.0, 1 - waited_s / busy_s)  # share, in [0, 1]
    return {f"{what}_s": waited_s, f"{what}_busy_s": busy_s, f"{what}_hidden": hidden}


class SampleRow(NamedTuple):
    """One line of TensorBoard's table of samples."""

    prompt: str
    completion: str
    verdict: str  # pass, fail or error
    reason: str  # failure category, extracted answer, detail


def sample_rows(groups: Sequence[RolloutGroup], limit: int) -> list[SampleRow]:
    """Up to ``limit`` judged samples, spread evenly over the groups.

    The n-th row takes its group's n-th sample (modulo the group's size), so that rows differ in
    luck as well as in task.
    """
    chosen = [groups[i * len(groups) // limit] for i in range(limit)] if groups else []
    if len(groups) < limit:
        chosen = list(groups)
    rows = []
    for i, group in enumerate(chosen):
        completion = group.completions[i % len(group.completions)]
        verdict = group.verdicts[i % len(group.completions)]
        found = ""  # a program or proof stands in the completion, and has no one right text
        if group.task.answer:
            found = f"answer {verdict.answer!r}, expected {group.task.answer!r}"
        reason = "; ".join(part for part in (verdict.category, found, verdict.detail) if part)
        rows.append(SampleRow(group.task.prompt, completion.text, verdict.outcome.value, reason))
    return rows


class MetricsWriter:
    """Writes one TensorBoard run into ``tensorboard_dir``.

    Events go to the file in the caller's thread and reach the disk with ``flush``: a run that
    flushes before each checkpoint loses nothing up to it.  (tensorboardX's own SummaryWriter
    queues events to a thread, and its ``flush`` does not wait for the queue.)
    """

    def __init__(self, tensorboard_dir: str | os.PathLike[str], start_step: int = 0):
        """Opens a new event file; a resumed run's later events of earlier files are hidden.

        Args:
          tensorboard_dir: created if it does not exist.
          start_step: the optimizer step resumed from: events of later steps are void.
        """
        folder = Path(tensorboard_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # Numbered, because a second file of the same second and host would overwrite the first.
        earlier = len(list(folder.glob("events.out.tfevents.*")))
        self._events = EventsWriter(str(folder / "events"), f".{earlier:04d}")
        self._is_open = True
        self._session_end: Summary | None = None
        # Every file needs its session start: TensorBoard takes only a second one for a restart.
        session_start = SessionLog(status=SessionLog.START)
        self._write_event(Event(step=start_step + 1, session_log=session_start))
        self._write(start_step, tb.custom_scalars(OVERVIEW))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes numbers under their full names, e.g. "train/loss"; None is left out.

        Raises:
          ValueError: a name is outside the namespaces.
        """
        for tag, value in values.items():
            if tag.partition("/")[0] not in NAMESPACES or tag.endswith("/"):
                raise ValueError(f"metric {tag!r} is in none of {', '.join(NAMESPACES)}")
            if value is not None:
                self._write(step, tb.scalar(tag, float(value)))

    def text_samples(self, step: int, rows: Iterable[SampleRow], decision: str = "") -> None:
        """Writes a table of samples, headed by the curator's decision, as completions/samples."""
        lines = [f"**Curator:** {_as_markdown(decision)}", ""] if decision else []
        lines += ["| prompt | completion | verdict | reason |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(_as_markdown(text) for text in row) + " |" for row in rows]
        self._write(step, tb.text("completions/samples", "\n".join(lines)))

    def mastery_heatmap(self, step: int, mastery: Mapping[str, float]) -> None:
        """Draws {"skill/level": pass rate in [0, 1]} as curriculum/mastery."""
        self._image(step, "curriculum/mastery", figures.mastery_heatmap(mastery))

    def learning_curves(self, step: int, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Draws {name: [(step, share in [0, 1]), ...]} as eval/learning_curves."""
        self._image(step, "eval/learning_curves", figures.learning_curves(curves))

    def hparams(self, config: Mapping[str, Any], metric_tags: Sequence[str]) -> None:
        """Enters the run in the HParams page, at its start: the page fills while the run goes on.

        Args:
          config: nested settings; they are listed as "section.key".
          metric_tags: scalars whose latest value the page shows beside the settings.
        """
        experiment, start, self._session_end = tb.hparams(
            _flatten(config), dict.fromkeys(metric_tags, 0.0)
        )
        self._write(0, experiment)
        self._write(0, start)

    def finish(self) -> None:
        """Marks the session that ``hparams`` began as ended with success."""
        if self._session_end is None:
            raise ValueError("finish() before hparams()")
        self._write(0, self._session_end)

    def flush(self) -> None:
        """Returns once everything written is on the disk."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes; closing twice is harmless."""
        if self._is_open:
            self._events.close()
            self._is_open = False

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _image(self, step: int, tag: str, png: bytes) -> None:
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _write(self, step: int, summary: Summary) -> None:
        self._write_event(Event(step=step, summary=summary))

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


class JsonLinesLog:
    """An append-only file of JSON objects, one a line, that a resumed run cuts back to its past."""

    def __init__(self, path: str | os.PathLike[str], keep_rows: int = 0):
        """Opens ``path`` and drops everything after its first ``keep_rows`` rows.

        The cut is one system call: a kill leaves the file as it was or as it should be.

        Raises:
          UserError: the file has fewer complete rows than the checkpoint counted.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        for row in range(keep_rows):
            if not self._file.readline().endswith(b"\n"):
                self._file.close()
                raise UserError(
                    f"{self.path} has {row} rows where the checkpoint counted {keep_rows}",
                    "restore the file, or start anew in an empty workdir",
                )
        self._file.truncate(self._file.tell())
        self.num_rows = keep_rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row.  NaN and infinities, which JSON does not know, are written as null."""
        line = json.dumps({k: _as_json(v) for k, v in row.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self.num_rows += 1

    def sync(self) -> int:
        """Brings all rows to the disk; returns their number, for the checkpoint to keep."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.num_rows

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        self._file.flush()
        with self.path.open("rb") as file:
            return [json.loads(line) for line in file]

    def close(self) -> None:
        """Writes out what is buffered and closes; closing twice is harmless."""
        self._file.close()


class MetricsHistory(JsonLinesLog):
    """``metrics.jsonl``: every scalar of every step, floats exact to the last bit."""

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends {"step": step, **values}."""
        self.append({"step": step, **values})

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has a value called ``name``."""
        return [(row["step"], row[name]) for row in self.rows() if row.get(name) is not None]


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the history without what the machine measured."""
    measured = ("perf/", "verifier/pool/")
    return {name: value for name, value in row.items() if not name.startswith(measured)}


class SampleLog(JsonLinesLog):
    """``samples/*.jsonl``: every training completion with its verdict and where that came from."""

    def record(
        self, step: int, round_: int, groups: Iterable[RolloutGroup], provenance: str
    ) -> None:
        """Appends one row per completion.

        Args:
          step: optimizer step that trains on the samples.
          round_: round of the plan.
          groups: judged groups.
          provenance: what gave the reward, beside the judge of the domain: the version of the
            extractor.
        """
        for group in groups:
            for completion, verdict in zip(group.completions, group.verdicts, strict=True):
                is_judged = verdict.outcome is not Outcome.ERROR
                self.append(
                    {
                        "step": step,
                        "round": round_,
                        "task_id": group.task.task_id,
                        "cell": group.task.cell,
                        "prompt": group.task.prompt,
                        "completion": completion.text,
                        "finish_reason": completion.finish_reason,
                        "outcome": verdict.outcome.value,
                        "reward": verdict.reward if is_judged else None,
                        "category": verdict.category,
                        "answer": verdict.answer,
                        "method": verdict.method,
                        "value_correct": verdict.value_correct,
                        "is_subjective": verdict.is_subjective,
                        "is_left_out": verdict.is_left_out,
                        "unanswered": verdict.unanswered,
                        "detail": verdict.detail,
                        "task": group.task.to_dict(),
                        "provenance": f"{group.task.domain} judge, {provenance}",
                    }
                )


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str, dict, list)):
        return value
    number = float(value)  # also NumPy and JAX scalars
    return number if math.isfinite(number) else None


def _as_markdown(text: str) -> str:
    """Student text that shows as it is: nothing in it acts as Markdown, HTML or a table's bar.

    Characters that cannot be seen are written as escapes, e.g. \\x1b.
    """
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]} ... ({len(text) - _MAX_TEXT} more characters)"
    lines = []
    for line in text.expandtabs(4).split("\n"):
        visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        lines.append(re.sub(r"[^\w ]|_", lambda match: f"&#{ord(match[0])};", visible))
    return "<br>".join(lines)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, (bool, int, float, str))
            flat[f"{prefix}{key}"] = value if is_plain else json.dumps(value)
    return flat
