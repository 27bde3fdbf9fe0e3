"""Measures an SFT step, rollouts and a GRPO step, ours and the peers' in one run.

    python tools/bench_train.py --peer=peft,trl --json=bench.json

Needs the ``parity`` extra for ``--peer=peft`` and TRL for ``--peer=trl``.  Each side of each work
runs in a process of its own; all load the same weights, adapters and token ids and must agree on
a loss before anything is timed.  Repetitions alternate between the sides, and every ratio is
between neighbours in time.  Both sides run on the CPU, in one dtype, with their default threads.
See docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_work import SIZES, Channel, Job

WORKS = ("sft", "rollout", "tail", "grpo")
PEERS = {"peft": ("sft", "rollout"), "trl": ("grpo",)}
OTHERWISE = {"tail": "batches"}  # our own side with one setting changed, measured beside
#: Of the losses and log-probabilities that all sides must agree on, in nats.  bfloat16 has 8 bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


class Side:
    """A measuring process: warmed up when made, one repetition at a time afterwards.

    Raises:
      SystemExit: the process ended; its last words are the message.
    """

    def __init__(self, job: Job):
        self.job = job
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by ``close``
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--job={job.dumps()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(),
        )
        try:
            self.about = self._read()
        except SystemExit:
            self.close()
            raise

    def measure(self) -> dict[str, Any]:
        """One repetition: seconds by part, CPU seconds, CPUs busy elsewhere, peak memory."""
        assert self._process.stdin is not None
        busy, started = busy_cpu_s(), time.perf_counter()
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._read()
        wall = time.perf_counter() - started
        after = busy_cpu_s()
        answer["cpus_elsewhere"] = None
        if busy is not None and after is not None:
            answer["cpus_elsewhere"] = max(0.0, (after - busy - answer["cpu_s"]) / wall)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        words = self._log.read()[-2000:]
        raise SystemExit(f"{self.job.side} ended during {self.job.work}:\n{words}")


def _environment() -> dict[str, str]:
    """Both sides on the CPU; no simulated devices, and no compilation taken from a cache."""
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return {
        **inherited,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def busy_cpu_s() -> float | None:
    """Seconds that this machine's CPUs have worked since it started; None where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, stat.read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(work: str, peers: Sequence[str], repeats: int, scratch: str, **settings: Any) -> dict:
    """All sides of one work; ``settings`` are those of their ``Job``.

    Returns:
      {side: what it said of itself, and its "repetitions" in order}.

    Raises:
      SystemExit: a side ended, or the sides do not compute the same thing.
    """
    with contextlib.ExitStack() as stack:

        def start(job: Job) -> Side:
            side = Side(job)
            stack.callback(side.close)
            return side

        adapter = str(Path(scratch) / "adapter")
        job = Job(work, "ours", scratch=scratch, adapter=adapter, **settings)
        # One after another: first calls must not disturb each other.
        sides = [start(job)]
        job = dataclasses.replace(job, student=sides[0].about["student"])
        beside = [peer for peer in peers if work in PEERS[peer]]
        beside += [OTHERWISE[work]] if work in OTHERWISE else []
        for name in beside:
            sides.append(start(dataclasses.replace(job, side=name)))
            check_agreement(work, sides[0].about, sides[-1].about, TOLERANCE[job.dtype])
        repetitions: dict[str, list] = {side.job.side: [] for side in sides}
        for repeat in range(repeats):
            # There and back, so that neither side always follows the other.
            for side in sides if repeat % 2 == 0 else reversed(sides):
                repetitions[side.job.side].append(side.measure())
        return {s.job.side: {**s.about, "repetitions": repetitions[s.job.side]} for s in sides}


def check_agreement(
    work: str, ours: dict[str, Any], peer: dict[str, Any], tolerance: float = TOLERANCE["float32"]
) -> None:
    """Both sides' figures are the same to ``tolerance``, in nats.

    Raises:
      SystemExit: they are not, so that a comparison of their speed would mean nothing.
    """
    pairs = list(zip(ours["check"], peer["check"], strict=True))
    if not all(abs(a - b) <= tolerance for a, b in pairs):
        words = ", ".join(f"{a:.5f} / {b:.5f}" for a, b in pairs)
        raise SystemExit(f"{work}: {ours['label']} and {peer['label']} do different work: {words}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(work: str, sides: dict[str, dict], shape: str) -> list[dict[str, Any]]:
    """A record for each part and side: seconds, tokens/s, ratio to ours, peak memory, first call.

    ``ratio`` is the peer's seconds over ours, repetition by repetition: over 1, ours is faster.
    """
    records = []
    ours = sides["ours"]["repetitions"]
    for part in sides["ours"]["first"]:
        for name, side in sides.items():
            seconds = [r["seconds"][part] for r in side["repetitions"]]
            tokens = side.get("tokens", {}).get(part) or SIZES[shape].tokens(work, part)
            record = {
                "work": work,
                "part": part,
                "side": name,
                "label": side["label"],
                "seconds": spread(seconds),
                "tokens_per_s": tokens / statistics.median(seconds),
                "first_s": side["first"][part],
                "peak_rss_gib": side["repetitions"][-1]["peak_rss_gib"],
            }
            if name != "ours":
                record["ratio"] = spread(
                    [b / a["seconds"][part] for a, b in zip(ours, seconds, strict=True)]
                )
            records.append(record)
    return records


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records as a table."""
    lines = [
        "| work | side | s, median (min..max) | tokens/s | times as fast, ours | first call, s "
        "| peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        work = r["work"] if r["part"] == r["work"] else f"{r['work']} {r['part']}"
        ratio = _words(r["ratio"]) if "ratio" in r else ""
        lines.append(
            f"| {work} | {r['label']} | {_words(r['seconds'])} | {r['tokens_per_s']:.0f} | {ratio} "
            f"| {r['first_s']:.2f} | {r['peak_rss_gib']:.2f} |"
        )
    return "\n".join(lines)


def _words(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}..{values['max']:.2f})"


def machine() -> dict[str, Any]:
    """Where this runs, and how busy it is."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def noise(results: dict[str, dict[str, dict]]) -> float | None:
    """Most CPUs that other processes kept busy during any repetition; None where unknown."""
    found = [
        repetition["cpus_elsewhere"]
        for sides in results.values()
        for side in sides.values()
        for repetition in side["repetitions"]
    ]
    return None if None in found else max(found)


def _report(
    results: dict[str, dict[str, dict]], shape: str, start: dict[str, Any]
) -> dict[str, Any]:
    sides = [side for work in results.values() for side in work.values()]
    versions: dict[str, str] = {}
    for side in sides:
        versions |= side["versions"]
    return {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "machine": start,
        "load_average_end": os.getloadavg(),
        "cpus_elsewhere_max": noise(results),
        "versions": versions,
        "threads": sorted({side["threads"] for side in sides}),
        "shape": shape,
        "sizes": dataclasses.asdict(SIZES[shape]),
        "records": [r for work in results for r in summarise(work, results[work], shape)],
        "raw": results,
    }


def _print(report: dict[str, Any]) -> None:
    host, elsewhere = report["machine"], report["cpus_elsewhere_max"]
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    load = " -> ".join(f"{x[0]:.2f}" for x in (host["load_average"], report["load_average_end"]))
    print(markdown(report["records"]))
    print(f"\n{host['cpus']} x {host['cpu']}, {host['memory_gib']:.0f} GiB; {versions}")
    busy = "unknown" if elsewhere is None else f"{elsewhere:.2f}"
    print(f"{'; '.join(report['threads'])}; load average {load}; CPUs busy elsewhere: {busy}")
    if elsewhere is not None and elsewhere > 0.25:
        print("NOISY: other processes took part of the machine; do not publish these figures")


def _list_of(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        items = tuple(item for item in text.split(",") if item)
        for item in items:
            if item not in known:
                raise argparse.ArgumentTypeError(f"{item!r} is not one of {', '.join(known)}")
        return items

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--peer", type=_list_of(tuple(PEERS)), default=(), help="peft (sft, rollout), trl (grpo)"
    )
    parser.add_argument(
        "--only", type=_list_of(WORKS), default=WORKS, help="sft, rollout, tail, grpo"
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="timed repetitions a side")
    parser.add_argument("--json", type=Path, help="file for the whole report")
    parser.add_argument(
        "--model-shape", choices=tuple(SIZES), default="smollm2", help="tiny is for tests"
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="all sides'")
    parser.add_argument(
        "--sft-tokens", type=_positive, default=0, help="length of the SFT step's rows (256)"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)  # this process is a side
    return parser


def _run_side(job: Job) -> None:
    channel = Channel()
    module = importlib.import_module("bench_peers" if job.side in PEERS else "bench_ours")
    getattr(module, job.work)(job, channel)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.job:
        return _run_side(Job(**json.loads(args.job)))
    for peer in args.peer:
        if importlib.util.find_spec(peer) is None:
            parser.error(f"--peer={peer}: pip install {peer} first")
    start, results = machine(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for work in args.only:
            print(f"{work} ...", file=sys.stderr, flush=True)
            results[work] = measure(
                work,
                args.peer,
                args.repeats,
                scratch,
                shape=args.model_shape,
                dtype=args.dtype,
                sft_tokens=args.sft_tokens,
            )
    report = _report(results, args.model_shape, start) | {"dtype": args.dtype}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    _print(report)


if __name__ == "__main__":
    main()
