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

import bench_accelerator  # noqa: E402
import bench_flops  # noqa: E402
import bench_ours  # noqa: E402
import bench_report  # noqa: E402
import bench_sides  # noqa: E402
import bench_train  # noqa: E402
from bench_work import PEERS, SIDES, SIZES, WORKS, Job, Recorder, sft_rows, token_rows  # noqa: E402

from cosr_jax.student.model import ModelConfig  # noqa: E402

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("bench"))


def measure_ours(work: str, scratch: str, side: str = "ours", repeats: int = 2) -> Recorder:
    recorder = Recorder(repeats)
    job = Job(work, side, "tiny", scratch, adapter=f"{scratch}/adapter")
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
    assert len(recorder.about["check"]) == TINY.rollout_prompts
    assert all(-math.log(96) <= logprob < 0 for logprob in recorder.about["check"])
    assert len(recorder.seconds) == 2


def test_a_long_tail_is_the_same_work_on_both_sides(scratch):
    refilled, whole = (measure_ours("tail", scratch, s, 1).about for s in ("ours", "batches"))
    assert refilled["check"] == whole["check"] and refilled["amounts"] == whole["amounts"]
    tokens, _ = refilled["amounts"]["rollout"]
    assert tokens / (TINY.tail_prompts * TINY.tail_samples) == pytest.approx(refilled["check"][0])
    assert refilled["check"][0] < TINY.tail_limit


@pytest.mark.slow
def test_a_shared_prompt_is_the_same_step(scratch):
    shared, unshared = (measure_ours("shared", scratch, s, 1).about for s in ("ours", "unshared"))
    bench_sides.check_agreement("shared", shared, unshared, tolerance=1e-5)
    assert "48 instead of 96 tokens" in shared["predicted"]


@pytest.mark.slow
def test_compiling_and_ceilings_are_measured(scratch):
    seconds = measure_ours("compile", scratch).about["first"]
    assert 0 < seconds["step"] < seconds["together"]
    recorder = measure_ours("ceiling", scratch, repeats=1)
    assert set(recorder.seconds[0]) == set(recorder.about["amounts"])
    assert all(seconds > 0 for seconds in recorder.seconds[0].values())


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
    rows = sft_rows(96, TINY)
    assert [len(row) for row in rows] == [TINY.sft_tokens] * TINY.sft_rows
    assert all(24 <= token < 96 for row in rows for token in row)


def test_operations_are_counted_product_by_product():
    # 2 layers of 2 heads of 2, one key-value head, hidden 4, mlp 6, vocabulary 10.
    config = ModelConfig(10, 4, 6, 2, 2, 1, 2, 1e-5, 1e4, True)
    frozen = 2 * (4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6))
    adapters = 2 * 3 * ((4 + 4) + 2 * (4 + 2) + (4 + 4) + 3 * (4 + 6))
    pairs = 5 * (1 + 2 + 3)  # of 5 rows of 3 tokens
    attention = 3 * (2 * 2) * 2 * (2 * 2) * pairs
    whole = (4 * frozen + 6 * adapters) * 15 + 4 * (4 * 10) * 10 + attention
    assert bench_flops.sft_flops(config, 3, 5, 3) == whole


def test_a_shared_prompt_saves_its_tokens_and_their_attention():
    config = ModelConfig(10, 4, 6, 2, 2, 1, 2, 1e-5, 1e4, True)
    alone = bench_flops.group_flops(config, 3, 7, 1, 2, shared=False)
    assert bench_flops.group_flops(config, 3, 7, 1, 2, shared=True) == alone
    (few, less), (many, more) = (
        bench_flops.group_flops(config, 3, 7, 4, 2, shared=shared) for shared in (True, False)
    )
    prompt = bench_flops.train_flops(config, 3, 7, 0, bench_flops.causal_pairs(7))
    assert (few, many) == (7 + 4 * 2, 4 * (7 + 2)) and more - less == 3 * prompt


def test_decoding_reads_weights_once_and_the_cache_of_every_row():
    config = ModelConfig(10, 4, 6, 2, 2, 1, 2, 1e-5, 1e4, True)
    weights = 2 * (4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6)) + 4 * 10
    cache = 3 * 5 * (2 * 2 * 1 * 2)  # rows, positions; layers, keys and values, heads, size
    assert bench_flops.decode_bytes(config, 3, 5, width=2) == 2 * (weights + cache)


def side(label: str, seconds: list[float], check: list[float], **about) -> dict:
    repetitions = [
        {"seconds": {"step": s}, "cpu_s": s, "peak_rss_gib": 1.0 + i, "cpus_elsewhere": 0.1 * i}
        for i, s in enumerate(seconds)
    ]
    about |= {"label": label, "check": check, "first": {"step": 9.0}}
    return {**about, "repetitions": repetitions}


def test_ratios_are_taken_repetition_by_repetition():
    sides = {
        "ours": side("ours", [1.0, 2.0, 1.0], [3.0], flops={"step": 6e9}),
        "peft": side("peft", [2.0, 6.0, 1.0], [3.0]),
    }
    ours, peer = bench_report.summarise("sft", sides, "tiny")
    assert "ratio" not in ours
    assert ours["seconds"] == {"median": 1.0, "min": 1.0, "max": 2.0}
    assert peer["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    tokens = TINY.sft_rows * TINY.sft_tokens
    assert ours["rate"] == tokens and peer["rate"] == tokens / 2
    assert peer["peak_rss_gib"] == 3.0
    assert bench_report.noise({"sft": sides}) == pytest.approx(0.2)
    table = bench_report.markdown([ours, peer], {"sft": {"tunix": "not installed"}})
    row = "| sft step | peft | 2.00 (1.00..6.00) | 24 tokens | 2.00 (1.00..3.00) | 9.00 | 3.00 |"
    assert row in table and "| sft | tunix | not installed |" in table


def test_figures_are_held_against_what_is_needed():
    works = {
        "ceiling": {"ours": side("XLA", [0.5], [], amounts={"step": (4e9, "FLOP")})},
        "sft": {
            "ours": side("ours", [2.0], [3.0], flops={"step": 6e9}),
            "peft": side("peft", [2.8], [3.0]),
        },
        "sft-4x": {"ours": side("ours", [15.0], [3.0], flops={"step": 30e9})},
    }
    works["ceiling"]["ours"]["first"] = {"products float32": 1.0}
    works["ceiling"]["ours"]["amounts"] = {"products float32": (4e9, "FLOP")}
    works["ceiling"]["ours"]["repetitions"][0]["seconds"] = {"products float32": 0.5}
    records = [r for work, s in works.items() for r in bench_report.summarise(work, s, "tiny")]
    found = bench_report.figures(records)
    assert found["sft step: speed beside peft"] == pytest.approx(1.4)
    assert found["sft step: share of the ceiling"] == pytest.approx(3 / 8)
    assert found["sft-4x: growth of time"] == pytest.approx(7.5)
    assert found["sft-4x: growth of FLOPs"] == pytest.approx(5.0)
    lines = {line.partition(":")[0]: [] for line in bench_report.verdicts(found)}
    for line in bench_report.verdicts(found):
        lines[line.partition(":")[0]].append(line)
    assert "sft step: speed beside peft: 1.40 (not reached: at least 1.5 needed" in str(lines)
    assert "sft-4x: growth of time: 7.50 (not reached: at most 7 needed" in str(lines)
    assert "sft step: memory of peft: 1.00 (not reached" in str(lines)


def test_targets_name_figures_that_there_are():
    for name in (*bench_report.AT_LEAST, *bench_report.AT_MOST):
        work = name.split(":")[0].split()[0]
        assert work in WORKS
        if " beside " in name:
            assert name.rpartition(" ")[2] in WORKS[work].beside
    assert {s for work in WORKS.values() for s in work.beside} < set(SIDES)


@pytest.mark.parametrize("other", [3.0011, 2.9989, math.nan])
def test_sides_that_compute_different_things_are_not_compared(other):
    ours = side("ours", [1.0], [5.0, 3.0])
    bench_sides.check_agreement("sft", ours, side("peft", [1.0], [5.0005, 3.0]))
    with pytest.raises(SystemExit, match="different work"):
        bench_sides.check_agreement("sft", ours, side("peft", [1.0], [5.0, other]))


@pytest.mark.parametrize(
    "argument, word",
    [
        ("--peer=keras", "'keras'"),
        ("--only=sft,dpo", "'dpo'"),
        ("--repeats=0", "'0'"),
        ("--peer-python=tunix=/nowhere/python", "'tunix=/nowhere/python'"),
        ("--peer-python=keras=/bin/sh", "'keras=/bin/sh'"),
    ],
)
def test_bad_arguments_are_refused(argument, word, capsys):
    with pytest.raises(SystemExit):
        bench_train.main([argument])
    assert word in capsys.readouterr().err


def test_a_side_that_dies_is_named_with_its_last_words(scratch):
    # No such work: the process starts, and ends before it has anything to tell.
    with pytest.raises(SystemExit, match=r"(?s)ours ended during dpo:.*dpo"):
        bench_sides.Side(Job("dpo", "ours", "tiny", scratch))


def test_a_side_that_is_killed_says_so(scratch, monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(bench_sides, "SCRIPT", script)
    with pytest.raises(SystemExit, match="killed by signal 9, for want of memory"):
        bench_sides.Side(Job("sft", "ours", "tiny", scratch))


def run_with_sides(monkeypatch, tmp_path, disagreeing: tuple[str, ...]) -> dict:
    """The whole command with made-up sides, of which only PEFT is installed."""

    class Fake:
        def __init__(self, job, python):
            self.job = job
            check = [5.0 if job.side in disagreeing else 3.0]
            self.about = side(job.side, [], check, student="", threads="none", versions={})
            self.measure = lambda: side("", [2.0], [])["repetitions"][0]
            self.close = lambda: None

    monkeypatch.setattr(bench_sides, "Side", Fake)
    monkeypatch.setattr(bench_train, "is_installed", lambda name, python: name == "peft")
    report = tmp_path / "bench.json"
    try:
        bench_train.main(["--model-shape=tiny", "--only=sft", f"--json={report}"])
    finally:
        found = json.loads(report.read_text())
    return found


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch, tmp_path, capsys):
    report = run_with_sides(monkeypatch, tmp_path, disagreeing=())
    assert report["missing"] == {"sft": {"tunix": "not installed"}}
    assert [r["side"] for r in report["records"]] == ["ours", "peft"]
    assert "| sft | tunix | not installed |" in capsys.readouterr().out


def test_a_peer_that_does_other_work_is_told_at_the_end(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"sft: .*different work"):
        run_with_sides(monkeypatch, tmp_path, disagreeing=("peft",))
    assert "different work: 3.00000 / 5.00000" in capsys.readouterr().out


def test_installed_means_found_by_that_interpreter():
    assert bench_sides.is_installed("ours", sys.executable)
    assert not bench_sides.is_installed("ours", "/bin/false")
    assert all(peer in SIDES for peer in PEERS)


@pytest.mark.slow
def test_the_accelerator_script_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "report.json"
    bench_accelerator.main(["--shape=tiny", "--repeats=1", f"--json={path}"])
    report, said = json.loads(path.read_text()), capsys.readouterr().out
    assert sum(report["grpo"]["shares"].values()) == pytest.approx(1.0)
    assert set(report["grpo"]["shares"]) == {"rollout", "verify", "logprobs", "train"}
    assert report["sft"]["peak_memory_gib"] == "not measured"  # a CPU does not tell
    assert "peak memory not measured" in said and "MFU" in said and "of the bandwidth floor" in said


@pytest.mark.slow
@pytest.mark.parity
def test_the_whole_command_beside_its_peers(tmp_path):
    peers = [peer for peer in PEERS if bench_sides.is_installed(peer, sys.executable)]
    report = tmp_path / "bench.json"
    command = [sys.executable, TOOLS / "bench_train.py", "--model-shape=tiny", "--repeats=2"]
    command += [f"--json={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(report.read_text())["records"]
    compared = {(r["work"], r["side"]) for r in records if "ratio" in r}
    assert compared >= {("sft", "peft"), ("rollout", "peft")}
    assert (("grpo", "trl") in compared) == ("trl" in peers)
    assert {("tail", "batches"), ("shared", "unshared")} <= compared
    assert all(r["seconds"]["min"] > 0 and r["peak_rss_gib"] > 0 for r in records)
    assert "times as fast" in done.stdout
