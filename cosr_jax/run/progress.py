"""Live progress: one updating table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Progress:
    """Shows what a run is doing.

    On a terminal: the current phase above a table of the finished rounds and the current step.
    Elsewhere: one line per phase, step, round and note, each printed once and at once; only a
    round's line has the elapsed time.

    Rows are {column: value}; floats are shown with four significant digits, None as "-".  A row's
    first keys give the order of columns.

    Usage:
      with Progress() as progress:
          progress.phase("format drill, 4 steps")
          progress.step({"step": 1, "loss": 2.31, "reward": None})
          progress.round({"round": 1, "strategy": "format_drill", "validation": 0.34})
    """

    def __init__(self, file: IO[str] | None = None, keep_rounds: int = 12):
        """Writes to ``file`` (stdout); the live table shows the last ``keep_rounds`` rounds."""
        self._console = Console(file=file, highlight=False)
        self._keep_rounds = keep_rounds
        self._start = time.monotonic()
        self._phase = ""
        self._step: Mapping[str, Any] = {}
        self._rounds: list[Mapping[str, Any]] = []
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """Says what begins now, e.g. "round 3: reinforce, because ..."."""
        self._phase, self._step = text, {}
        self._line(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a step's figures; on a terminal they replace those of the step before."""
        self._step = dict(row)
        self._line("  " + _plain(row))

    def round(self, row: Mapping[str, Any]) -> None:
        """Adds a finished round's figures to the table."""
        row = {**row, "elapsed": _clock(time.monotonic() - self._start)}
        self._rounds.append(row)
        self._line(_plain(row))

    def note(self, text: str) -> None:
        """Says something that stays: on a terminal above the table."""
        self._console.print(Text(text), soft_wrap=True)

    def _line(self, text: str) -> None:
        if self._live is None:
            self._console.print(Text(text), soft_wrap=True)
            self._console.file.flush()

    def _render(self) -> Group:
        parts: list[Any] = []
        if self._rounds:
            columns = list(dict.fromkeys(name for row in self._rounds for name in row))
            table = Table(*columns)
            for row in self._rounds[-self._keep_rounds :]:
                table.add_row(*(Text(_show(row.get(name))) for name in columns))
            parts.append(table)
        elapsed = _clock(time.monotonic() - self._start)
        parts.append(Text(f"{elapsed}  {self._phase}", style="bold"))
        if self._step:
            parts.append(Text("  " + _plain(self._step)))
        return Group(*parts)


def _plain(row: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_show(value)}" for name, value in row.items())


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
