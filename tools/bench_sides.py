"""The measuring processes of ``bench_train``: one for each side of a work, taking turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_work import SIDES, Job, Work

#: Of the losses and log-probabilities that all sides must agree on, in nats.  bfloat16 has 8 bits,
#: and Adam's first update takes the sign of gradients: PEFT's loss after it lies 0.17 from that in
#: float32, ours 0.10 (an update moves it by 0.4).
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
SCRIPT = Path(__file__).with_name("bench_train.py")


class Side:
    """A measuring process: warmed up when made, one repetition at a time afterwards.

    Raises:
      SystemExit: the process ended; its last words are the message.
    """

    def __init__(self, job: Job, python: str = sys.executable):
        self.job = job
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by ``close``
        self._process = subprocess.Popen(
            [python, SCRIPT, f"--job={job.dumps()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(),
        )
        try:
            self.about = self._timed()
        except SystemExit:
            self.close()
            raise

    def measure(self) -> dict[str, Any]:
        """One repetition: seconds by part, CPU seconds, CPUs busy elsewhere, peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._timed()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _timed(self) -> dict[str, Any]:
        """The next answer, and how many CPUs others kept busy until it came."""
        busy, started = busy_cpu_s(), time.perf_counter()
        answer = self._read()
        wall = time.perf_counter() - started
        after = busy_cpu_s()
        answer["cpus_elsewhere"] = None
        if busy is not None and after is not None:
            answer["cpus_elsewhere"] = max(0.0, (after - busy - answer["cpu_s"]) / wall)
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        words = self._log.read()[-2000:]
        if status < 0:
            words += f"killed by signal {-status}" + (
                ", for want of memory?" if status == -9 else ""
            )
        raise SystemExit(f"{self.job.side} ended during {self.job.work}:\n{words}")


def _environment() -> dict[str, str]:
    """All sides on the CPU; no simulated devices, and no compilation taken from a cache."""
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


def is_installed(side: str, python: str) -> bool:
    """Whether ``python`` finds the package that ``side`` needs."""
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({SIDES[side][1]!r}) is None)"
    return subprocess.run([python, "-c", find], check=False).returncode == 0


def measure(
    work: Work,
    shape: str,
    sides: Sequence[str],
    repeats: int,
    scratch: str,
    pythons: Mapping[str, str],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All sides of one work.

    Args:
      work: what is done.
      shape: key of ``SIZES``.
      sides: who does it beside our own.
      repeats: timed repetitions of each side.
      scratch: folder of the run.
      pythons: interpreter of each side that has one of its own.

    Returns:
      {side: what it said of itself, and its "repetitions" in order}, and {side: why it could not
      be measured}: it ended before it was ready, or does not compute the same thing as ours.

    Raises:
      SystemExit: our own side ended, or another one during its repetitions.
    """
    with contextlib.ExitStack() as stack:

        def start(job: Job) -> Side:
            side = Side(job, pythons.get(job.side, sys.executable))
            stack.callback(side.close)
            return side

        adapter = str(Path(scratch) / "adapter")
        job = Job(
            work.function, "ours", shape, scratch, "", adapter, dtype=work.dtype, length=work.length
        )
        # One after another: first calls must not disturb each other.
        started = [start(job)]
        job = dataclasses.replace(job, student=started[0].about["student"])
        if work.is_first_call:
            started += [start(job) for _ in range(repeats - 1)]
            firsts = [{**side.about, "seconds": side.about["first"]} for side in started]
            return {"ours": {**started[0].about, "repetitions": firsts}}, {}
        failed = {}
        for name in sides:
            try:
                side = start(dataclasses.replace(job, side=name))
                check_agreement(job.work, started[0].about, side.about, TOLERANCE[job.dtype])
            except SystemExit as error:
                failed[name] = str(error)
            else:
                started.append(side)
        if announced := started[0].about.get("predicted"):
            print(announced, file=sys.stderr, flush=True)
        repetitions: dict[str, list] = {side.job.side: [] for side in started}
        for repeat in range(repeats):
            # There and back, so that neither side always follows the other.
            for side in started if repeat % 2 == 0 else reversed(started):
                repetitions[side.job.side].append(side.measure())
        found = {s.job.side: {**s.about, "repetitions": repetitions[s.job.side]} for s in started}
        return found, failed


def check_agreement(
    work: str, ours: dict[str, Any], other: dict[str, Any], tolerance: float = TOLERANCE["float32"]
) -> None:
    """Both sides' figures are the same to ``tolerance``, in nats.

    Raises:
      SystemExit: they are not, so that a comparison of their speed would mean nothing.
    """
    pairs = list(zip(ours["check"], other["check"], strict=True))
    if not all(abs(a - b) <= tolerance for a, b in pairs):
        words = ", ".join(f"{a:.5f} / {b:.5f}" for a, b in pairs)
        raise SystemExit(f"{work}: {ours['label']} and {other['label']} do different work: {words}")
