"""Saved completions, judged again."""

import dataclasses
import json

import pytest
from rich.console import Console

from cosr_jax.config import VerifierConfig
from cosr_jax.run import rejudge
from cosr_jax.run.metrics import SampleLog
from cosr_jax.types import Completion, Outcome, RolloutGroup, Task, UserError, Verdict

TASK = Task("math", "addition", 0.0, "What is 12 + 7?", "19", "addition:12+7")
PASS = Verdict(Outcome.PASS, 1.0, answer="19", method="boxed", value_correct=True)


def completion(text: str) -> Completion:
    return Completion((1,), (0.0,), text, "stop")


def save(folder, texts, verdicts):
    (folder / "samples").mkdir()
    log = SampleLog(folder / "samples" / "train.jsonl", 0)
    group = RolloutGroup(TASK, (1,), tuple(map(completion, texts)), tuple(verdicts))
    log.record(3, 1, [group], "an old verifier")
    log.close()


def test_a_run_is_judged_again_and_every_change_is_counted_by_category(tmp_path, capsys):
    wrong = Verdict(Outcome.FAIL, 0.0, "wrong_answer", answer="20", method="boxed")
    error = Verdict(Outcome.ERROR, 0.0, detail="a worker died")
    texts = [r"\boxed{19}", r"\boxed{20}", r"\boxed{20}", r"\boxed{19}"]
    save(tmp_path, texts, [PASS, PASS, wrong, error])
    assert rejudge.run(VerifierConfig(workers=1), tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "rejudged.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["pass", "fail", "fail", "pass"]
    assert [row["before"]["outcome"] for row in rows] == ["pass", "pass", "fail", "error"]
    assert all("an old verifier" in row["before"]["provenance"] for row in rows)
    assert all("extractor" in row["provenance"] and row["step"] == 3 for row in rows)
    printed = capsys.readouterr().out
    assert "2 of 4 verdicts change" in printed
    assert "wrong_answer" in printed


class Fake:
    """Passes everything."""

    def judge(self, cases):
        return [dataclasses.replace(PASS, reward=0.5) for _ in cases]

    def close(self):
        pass


def test_what_cannot_be_judged_again_is_counted_and_named(tmp_path):
    save(tmp_path, [r"\boxed{19}"] * 300, [PASS] * 300)
    file = tmp_path / "samples" / "train.jsonl"
    old = json.loads(file.read_text().splitlines()[0])
    del old["task"]
    with file.open("a") as stream:
        stream.write(json.dumps(old) + "\n" + '{"task": 1}\n[]\n{"cut')
    changes = rejudge.rejudge([file], Fake(), tmp_path / "out.jsonl")
    assert changes.changed == {("pass", "pass"): 300}, "the reward changed"
    assert sum(changes.skipped.values()) == 4
    assert changes.skipped["no task saved"] == 1
    console = Console(record=True, width=100)
    rejudge.show(changes, console)
    assert "1 rows left out: no task saved" in console.export_text()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 300


def test_a_mistake_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no saved completions"):
        rejudge.run(VerifierConfig(workers=1), tmp_path)
    save(tmp_path, [r"\boxed{19}"], [PASS])
    file = tmp_path / "samples" / "train.jsonl"
    with pytest.raises(UserError, match="it is what is judged again"):
        rejudge.run(VerifierConfig(workers=1), file, file)
