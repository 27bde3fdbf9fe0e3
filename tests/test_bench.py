"""The benchmark does what it says: whole works at tiny shapes, and refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import bench_ours  # noqa: E402
import bench_train  # noqa: E402
from bench_work import SIZES, Job, sft_rows, token_rows  # noqa: E402


class Recorder:
    """A channel that asks for ``repeats`` repetitions and keeps what it is told."""

    def __init__(self, repeats: int):
        self.left = repeats
        self.about: dict = {}
        self.seconds: list[dict[str, float]] = []

    def ready(self, label, first, check, **about):
        self.about = {"label": label, "first": first, "check": list(check), **about}

    def go_on(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def done(self, **seconds):
        self.seconds.append(seconds)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("bench"))


def measure_ours(work: str, scratch: str) -> Recorder:
    recorder = Recorder(repeats=2)
    job = Job(work, "ours", "tiny", scratch, adapter=f"{scratch}/adapter")
    getattr(bench_ours, work)(job, recorder)
    return recorder


def test_sft_learns_its_batch(scratch):
    recorder = measure_ours("sft", scratch)
    first, second = recorder.about["check"]
    assert second < first
    assert [set(s) for s in recorder.seconds] == [{"step"}] * 2
    assert (Path(scratch) / "adapter" / "adapter_config.json").exists()


def test_rollout_samples_without_early_stop(scratch):
    recorder = measure_ours("rollout", scratch)
    # The likeliest token of 96 has at least a share of 1 / 96.
    assert len(recorder.about["check"]) == SIZES["tiny"].rollout_prompts
    assert all(-math.log(96) <= logprob < 0 for logprob in recorder.about["check"])
    assert len(recorder.seconds) == 2


def test_a_long_tail_is_the_same_work_on_both_sides(scratch):
    sides = []
    for name in ("ours", "batches"):
        sides.append(Recorder(repeats=1))
        bench_ours.tail(Job("tail", name, "tiny", scratch, adapter=f"{scratch}/adapter"), sides[-1])
    refilled, whole = (recorder.about for recorder in sides)
    assert refilled["check"] == whole["check"] and refilled["tokens"] == whole["tokens"]
    rows = SIZES["tiny"].tail_prompts * SIZES["tiny"].tail_samples
    assert refilled["tokens"]["rollout"] / rows == pytest.approx(refilled["check"][0])
    assert refilled["check"][0] < SIZES["tiny"].tail_limit


@pytest.mark.slow
def test_grpo_tells_rollout_and_training_apart(scratch):
    recorder = measure_ours("grpo", scratch)
    assert len(recorder.seconds) == 2
    for seconds in (recorder.about["first"], *recorder.seconds):
        assert seconds["rollout"] > 0 and seconds["train"] > 0
        assert seconds["step"] == pytest.approx(seconds["rollout"] + seconds["train"])


def test_inputs_are_the_same_in_every_process():
    assert token_rows(96, 2, 3, seed=5) == token_rows(96, 2, 3, seed=5)
    assert token_rows(96, 2, 3, seed=5) != token_rows(96, 2, 3, seed=6)
    rows = sft_rows(96, SIZES["tiny"])
    assert [len(row) for row in rows] == [SIZES["tiny"].sft_tokens] * SIZES["tiny"].sft_rows
    assert all(24 <= token < 96 for row in rows for token in row)


def side(label: str, seconds: list[float], check: list[float]) -> dict:
    repetitions = [
        {"seconds": {"step": s}, "cpu_s": s, "peak_rss_gib": 1.0 + i, "cpus_elsewhere": 0.1 * i}
        for i, s in enumerate(seconds)
    ]
    return {"label": label, "check": check, "first": {"step": 9.0}, "repetitions": repetitions}


def test_ratios_are_taken_repetition_by_repetition():
    sides = {
        "ours": side("ours", [1.0, 2.0, 1.0], [3.0]),
        "peft": side("peft", [2.0, 6.0, 1.0], [3.0]),
    }
    ours, peer = bench_train.summarise("sft", sides, "tiny")
    assert "ratio" not in ours
    assert ours["seconds"] == {"median": 1.0, "min": 1.0, "max": 2.0}
    assert peer["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    tokens = SIZES["tiny"].sft_rows * SIZES["tiny"].sft_tokens
    assert ours["tokens_per_s"] == tokens and peer["tokens_per_s"] == tokens / 2
    assert peer["peak_rss_gib"] == 3.0
    assert bench_train.noise({"sft": sides}) == pytest.approx(0.2)
    assert "| sft step | peft | 2.00 (1.00..6.00) | 24 | 2.00 (1.00..3.00) | 9.00 | 3.00 |" in (
        bench_train.markdown([ours, peer])
    )


@pytest.mark.parametrize("other", [3.0011, 2.9989, math.nan])
def test_sides_that_compute_different_things_are_not_compared(other):
    ours = side("ours", [1.0], [5.0, 3.0])
    bench_train.check_agreement("sft", ours, side("peft", [1.0], [5.0005, 3.0]))
    with pytest.raises(SystemExit, match="different work"):
        bench_train.check_agreement("sft", ours, side("peft", [1.0], [5.0, other]))


@pytest.mark.parametrize(
    "argument, word",
    [("--peer=tunix", "'tunix'"), ("--only=sft,dpo", "'dpo'"), ("--repeats=0", "'0'")],
)
def test_bad_arguments_are_refused(argument, word, capsys):
    with pytest.raises(SystemExit):
        bench_train.main([argument])
    assert word in capsys.readouterr().err


def test_a_side_that_dies_is_named_with_its_last_words(scratch):
    # No such work: the process starts, and ends before it has anything to tell.
    with pytest.raises(SystemExit, match=r"(?s)ours ended during dpo:.*dpo"):
        bench_train.Side(Job("dpo", "ours", "tiny", scratch))


@pytest.mark.slow
@pytest.mark.parity
def test_the_whole_command_beside_its_peers(tmp_path):
    peers = ["peft"] + ["trl"] * (bench_train.importlib.util.find_spec("trl") is not None)
    report = tmp_path / "bench.json"
    command = [sys.executable, TOOLS / "bench_train.py", "--model-shape=tiny", "--repeats=2"]
    command += [f"--peer={','.join(peers)}", f"--json={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(report.read_text())["records"]
    compared = {(r["work"], r["side"]) for r in records if "ratio" in r}
    assert compared >= {("sft", "peft"), ("rollout", "peft")}
    assert (("grpo", "trl") in compared) == ("trl" in peers)
    assert all(r["seconds"]["min"] > 0 and r["peak_rss_gib"] > 0 for r in records)
    assert "times as fast" in done.stdout
