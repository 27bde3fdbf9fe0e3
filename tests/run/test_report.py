import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.run.report import (
    Best,
    Comparison,
    Proportion,
    RunReport,
    SolvedExample,
    StrategyRecord,
    SuiteResult,
    next_commands,
    render_markdown,
    render_terminal,
    write_report,
)
from cosr_jax.run.statistics import paired_bootstrap, wilson_interval
from cosr_jax.types import CodeChecks, Task, level_difficulty


@pytest.fixture(autouse=True)
def no_forced_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


TASKS = [
    Task("math", skill, level_difficulty(level), f"{skill} {i}?", str(i), f"{skill}:{level}:{i}")
    for skill, level in (("addition", 1), ("addition", 2), ("sorting", 1))
    for i in range(4)
]


def probe(strict, lenient=None, judged=None):
    """A measurement from strings of 1 and 0, one digit per task."""
    passed = tuple(c == "1" for c in strict)
    return ProbeResult(
        judged=tuple(c == "1" for c in judged or "1" * len(strict)),
        strict=passed,
        lenient=tuple(c == "1" for c in lenient or strict),
        categories=tuple("" if p else "wrong_answer" for p in passed),
        answers=tuple(f"answer {i} {p}" for i, p in enumerate(passed)),
        generated_tokens=10,
    )


BEFORE = probe("000000001100", lenient="100000001100")
AFTER = probe("111010000111")


def suite(**changes):
    arguments = {"before": BEFORE, "after": AFTER, "tasks": TASKS, **changes}
    return SuiteResult.of("held_out", "ab" * 32, **arguments)


def full_report(**changes):
    values = {
        "status": "converged",
        "reason": "plateau: over the last 6 measurements",
        "seed": 3,
        "steps": 24,
        "rounds": 6,
        "wall_s": 432.4,
        "generated_tokens": 123456,
        "versions": {"cosr_jax": "0.1.0", "jax": "0.10.2"},
        "config_hash": "f" * 64,
        "suites": (suite(),),
        "strategies": (
            StrategyRecord(1, "format_drill", "format:low", "8% formatted | target 80%", 0.34),
            StrategyRecord(2, "reinforce", "format:high", "mixed groups", None),
        ),
        "best": Best(20, Proportion(90, 120)),
        "solved": SolvedExample.find("held_out", TASKS, BEFORE, AFTER),
        "commands": next_commands("runs/a b", ["--config=configs/quickstart.py:seed=3"]),
    }
    return RunReport(**{**values, **changes})


def test_a_suite_counts_by_hand():
    result = suite()
    assert (result.strict.before.rate, result.strict.after.rate) == (2 / 12, 7 / 12)
    assert result.lenient.before.rate == 3 / 12
    assert {name: (c.before.rate, c.after.rate) for name, c in result.cells.items()} == {
        "addition/1": (0.0, 0.75),
        "addition/2": (0.0, 0.25),
        "sorting/1": (0.5, 0.75),
    }
    assert {name: c.after.n for name, c in result.skills.items()} == {"addition": 8, "sorting": 4}
    assert result.categories == {"wrong_answer": 5}


def test_gains_are_paired_by_task():
    gain = suite(resamples=500, seed=7).strict.gain
    assert gain == paired_bootstrap(BEFORE.strict, AFTER.strict, resamples=500, seed=7)
    assert gain.gain == pytest.approx(5 / 12)


def test_tasks_without_a_verdict_on_either_side_are_left_out_of_both():
    before = dataclasses.replace(BEFORE, judged=(False,) + (True,) * 11)
    after = dataclasses.replace(AFTER, judged=(True,) * 11 + (False,))
    result = suite(before=before, after=after)
    assert (result.strict.after.n, result.unjudged) == (10, 2)
    assert (result.strict.before.successes, result.strict.after.successes) == (2, 5)
    assert result.cells["addition/1"].after == Proportion(2, 3)


def test_a_measurement_of_other_tasks_is_refused():
    with pytest.raises(ValueError, match="12 answers to 11 tasks"):
        suite(tasks=TASKS[:-1])


def test_report_json_is_the_contract(tmp_path):
    write_report(tmp_path, full_report())
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == [
        *("schema", "status", "reason", "seed", "steps", "rounds", "wall_s", "generated_tokens"),
        *("versions", "config_hash", "probes", "strategies", "best"),
    ]
    assert report["schema"] == 1
    held_out = report["probes"]["held_out"]
    contract = {"sha256", "n", "before", "after", "gain", "gain_ci95", "skills", "categories"}
    assert contract <= held_out.keys()
    assert held_out["sha256"] == "ab" * 32
    assert held_out["n"] == 12
    low, high = held_out["gain_ci95"]
    assert held_out["gain"] == pytest.approx(5 / 12)
    assert low < held_out["gain"] < high
    assert held_out["lenient"].keys() == {"before", "after", "gain", "gain_ci95"}
    assert held_out["skills"]["sorting"] == {"n": 4, "before": 0.5, "after": 0.75}
    assert report["strategies"][0] == {
        "round": 1,
        "strategy": "format_drill",
        "context": "format:low",
        "reason": "8% formatted | target 80%",
        "gain": 0.34,
    }
    interval = list(wilson_interval(90, 120))
    assert report["best"] == {"step": 20, "score": 0.75, "ci95": interval}


def test_a_mere_measurement_fills_after_alone(tmp_path):
    measured = suite(before=None, extra={"pass_at_8": 0.9})
    report = full_report(suites=(measured,), best=None, solved=None, strategies=())
    write_report(tmp_path, report)
    entry = json.loads((tmp_path / "report.json").read_text())["probes"]["held_out"]
    assert (entry["before"], entry["gain"], entry["gain_ci95"]) == (None, None, None)
    assert entry["after"] == 7 / 12
    assert entry["pass_at_8"] == 0.9
    assert entry["skills"]["sorting"] == {"n": 4, "before": None, "after": 0.75}
    text = (tmp_path / "report.md").read_text()
    assert "pass_at_8 90.0%" in text
    assert "| held_out | 12 | - | 58.3%" in text


def test_a_suite_without_any_verdict_reports_null():
    result = suite(before=probe("0" * 12, judged="0" * 12))
    assert result.strict.to_json() == {
        "before": None,
        "after": None,
        "gain": None,
        "gain_ci95": None,
    }
    assert "| held_out | 0 | - | - | - |" in render_markdown(full_report(suites=(result,)))


def test_numbers_that_are_no_numbers_never_reach_the_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, full_report(wall_s=math.nan))
    assert not list(tmp_path.iterdir())


def test_a_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path, full_report())
    write_report(tmp_path, full_report(status="stopped"))
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "stopped"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_solved_failure_is_one_whose_value_was_wrong():
    solved = full_report().solved
    # Task 0 had the right value in the wrong form; task 1 is the first with a wrong value.
    assert solved == SolvedExample(
        "held_out", "addition 1?", "1", "answer 1 False", "answer 1 True"
    )
    assert SolvedExample.find("held_out", TASKS, BEFORE, BEFORE) is None
    only_form = SolvedExample.find("s", TASKS[:1], probe("0", lenient="1"), probe("1"))
    assert only_form.prompt == "addition 0?"


def test_an_error_before_is_not_a_failure_solved():
    unjudged = probe("0", judged="0")
    assert SolvedExample.find("s", TASKS[:1], unjudged, probe("1")) is None


def test_markdown_tells_the_story():
    text = render_markdown(full_report())
    low, high = (100 * x for x in wilson_interval(7, 12))
    assert f"58.3% [{low:.1f}, {high:.1f}]" in text
    assert "Why it stopped: plateau: over the last 6 measurements." in text
    assert "24 optimizer steps in 6 rounds, 123,456 generated tokens, 7 min 12 s." in text
    assert "| 1 | format_drill | +34.0 | format:low | 8% formatted \\| target 80% |" in text
    assert "| 2 | reinforce | - |" in text
    assert "    addition 1?" in text
    assert "    answer 1 True" in text
    assert "held_out, what still fails: wrong_answer 5." in text
    for command in (
        "tensorboard --logdir 'runs/a b'/tensorboard",
        "cosr train --config=configs/quickstart.py:seed=3\n",
        "--config.train.max_rounds=40 --allow_config_change",
        "cosr export --workdir='runs/a b' --format=peft",
        "cosr export --workdir='runs/a b' --format=merged",
    ):
        assert command in text


def test_every_table_row_has_its_headers_columns():
    lines = render_markdown(full_report()).splitlines()
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    widths = [row.count("|") for row in rows]
    accuracy, rounds = 2 + 4, 2 + 2  # suite, form forgiven, two skills; two rounds
    assert widths == [6] * (accuracy + rounds)


def test_a_suite_of_one_skill_lists_its_levels():
    one = suite(tasks=TASKS[:8], before=probe("0" * 8), after=probe("11101000"))
    text = render_markdown(full_report(suites=(one,)))
    assert "| held_out: addition/1 | 4 | 0.0% [0.0, 49.0] | 75.0% [30.1, 95.4] | +75.0 [" in text
    assert "| held_out: sorting | 4 |" in render_markdown(full_report())


def test_student_text_cannot_leave_its_block():
    solved = SolvedExample("s", "# big", "1", "```\n</pre>\n| a |", "")
    text = render_markdown(full_report(solved=solved))
    assert "\n    # big\n" in text
    assert "\n    ```\n    </pre>\n    | a |\n" in text


FUNCTION = Task(
    "code",
    "py_formulas",
    0.0,
    "Write `f(x)`.",
    "",
    "py_formulas:x + 1",
    checks=CodeChecks("f", ("assert f(1) == 2", "assert f(2) == 3")),
)
MIXED = [*TASKS[:3], FUNCTION]


def test_domains_have_their_own_figures_where_there_are_several():
    after = dataclasses.replace(probe("1100"), categories=("", "", "wrong_answer", "syntax_error"))
    mixed = suite(tasks=MIXED, before=probe("1000"), after=after)
    assert mixed.to_json()["domains"] == {
        "code": {"n": 1, "before": 0, "after": 0, "categories": {"syntax_error": 1}},
        "math": {"n": 3, "before": 1 / 3, "after": 2 / 3, "categories": {"wrong_answer": 1}},
    }
    text = render_markdown(full_report(suites=(mixed,)))
    assert "| held_out: all of code | 1 | 0.0%" in text
    assert "held_out, what still fails in code: syntax_error 1." in text
    assert "held_out, what still fails in math: wrong_answer 1." in text
    assert "all of" not in render_markdown(full_report())


def test_code_that_is_solved_now_keeps_its_lines():
    program = "```python\ndef f(x):\n\treturn x + 1\x1b[2J\n```"
    before, after = (
        dataclasses.replace(probe(passed), answers=(text,))
        for passed, text in (("0", "No idea."), ("1", program))
    )
    solved = SolvedExample.find("s", [FUNCTION], before, after)
    text = render_markdown(full_report(solved=solved))
    assert "Asked:\n\n    Write `f(x)`.\n" in text
    assert "Tests:\n\n    assert f(1) == 2\n    assert f(2) == 3\n" in text
    assert "    ```python\n    def f(x):\n" in text
    out = io.StringIO()
    render_terminal(full_report(solved=solved), file=out)
    shown = out.getvalue()
    assert "after: \n    ```python\n    def f(x):\n        return x + 1\\x1b[2J\n    ```" in shown
    assert "\x1b" not in shown


def test_plain_terminal_lines():
    out = io.StringIO()
    render_terminal(full_report(solved=None), file=out)
    lines = out.getvalue().splitlines()
    assert lines[0] == "converged: plateau: over the last 6 measurements"
    assert lines[1].startswith("held_out: tasks 12, before 16.7% [")
    assert lines[-1] == "export merged weights: cosr export --workdir='runs/a b' --format=merged"
    assert "\x1b" not in out.getvalue()


def test_terminal_table(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    out = io.StringIO()
    assert Console(file=out).is_terminal
    solved = SolvedExample("s", "[bold]3 + 4?", "7", "\x1b[2Jgone", "[/oops]\n9")
    render_terminal(full_report(solved=solved), file=out)
    text = out.getvalue()
    assert "┃" in text
    assert "solved now: [bold]3 + 4?" in text  # no markup in student text
    assert "before: \\x1b[2Jgone" in text  # nor control of the terminal
    assert "after: [/oops] 9" in text


def test_comparison_of_nothing_before():
    assert Comparison.of(None, [True, False]) == Comparison(Proportion(1, 2))
