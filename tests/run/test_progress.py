import io
import re

import pytest
from rich.console import Console

from cosr_jax.run.progress import Progress


@pytest.fixture(autouse=True)
def no_forced_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def play(progress):
    with progress:
        progress.phase("round 1: format_drill, because 8% of answers are formatted")
        progress.step({"step": 1, "loss": 2.3456789, "reward": None, "strategy": "format_drill"})
        progress.step({"step": 2, "loss": 1.5, "reward": 0.25, "strategy": "format_drill"})
        progress.note("saved [step 2]")
        progress.round({"round": 1, "strategy": "format_drill", "validation": 0.34})
        progress.phase("round 2: reinforce")
        progress.round({"round": 2, "strategy": "reinforce", "validation": 0.5, "informative": 0.4})


def test_plain_lines_off_a_terminal():
    out = io.StringIO()
    play(Progress(out))
    assert out.getvalue().splitlines() == [
        "round 1: format_drill, because 8% of answers are formatted",
        "  step 1  loss 2.346  reward -  strategy format_drill",
        "  step 2  loss 1.5  reward 0.25  strategy format_drill",
        "saved [step 2]",
        "round 1  strategy format_drill  validation 0.34  elapsed 0:00",
        "round 2: reinforce",
        "round 2  strategy reinforce  validation 0.5  informative 0.4  elapsed 0:00",
    ]


def test_long_plain_lines_stay_one_line():
    out = io.StringIO()
    with Progress(out) as progress:
        progress.phase("x " * 200)
        progress.note("y " * 200)
    assert len(out.getvalue().splitlines()) == 2


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    out = io.StringIO()
    assert Console(file=out).is_terminal
    return out


def test_a_terminal_shows_a_table_and_the_notes(terminal):
    play(Progress(terminal))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "saved [step 2]" in text
    last = text[text.rindex("┏") :]
    heads = [cell.strip() for cell in last.splitlines()[1].strip("┃ ").split("┃")]
    assert heads == ["round", "strategy", "validation", "elapsed", "informative"]
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in last.splitlines() if line.startswith("│")]
    assert rows == [
        ["1", "format_drill", "0.34", "0:00", "-"],
        ["2", "reinforce", "0.5", "0:00", "0.4"],
    ]
    assert "round 2: reinforce" in last


def test_a_terminal_keeps_the_last_rounds(terminal):
    with Progress(terminal, keep_rounds=2) as progress:
        for i in range(5):
            progress.round({"round": f"r{i}"})
    last = terminal.getvalue()[terminal.getvalue().rindex("┏") :]
    assert [name in last for name in ("r2", "r3", "r4")] == [False, True, True]


def test_the_cursor_comes_back_after_an_exception(terminal):
    with pytest.raises(RuntimeError), Progress(terminal) as progress:
        progress.phase("training")
        raise RuntimeError
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
