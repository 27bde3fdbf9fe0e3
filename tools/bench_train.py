"""Measures training steps, rollouts and compilation, ours and the peers', in one run.

    python tools/bench_train.py --json=bench.json

Peers are transformers with PEFT, TRL, Tunix and vLLM; one that is not installed is a row that says
so.  Tunix and vLLM need versions of their own: ``--peer-python=tunix=PYTHON,vllm=PYTHON`` names the
interpreters of their environments.  Each side of each work runs in a process of its own; all load
the same weights, adapters and token ids and must agree on a loss before anything is timed.
Repetitions alternate between the sides, and every ratio is between neighbours in time.  All sides
run on the CPU, in one dtype, with their default threads.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Sides, figures, machine, markdown, noise, summarise, verdicts
from bench_sides import TOLERANCE, is_installed, measure
from bench_work import PEERS, SIDES, SIZES, WORKS, Channel, Job


def _report(
    results: dict[str, Sides],
    missing: dict[str, dict[str, str]],
    shape: str,
    start: dict[str, Any],
) -> dict[str, Any]:
    sides = [side for work in results.values() for side in work.values()]
    versions: dict[str, str] = {}
    for side in reversed(sides):
        versions |= side["versions"]  # ours last: a peer's environment may have others
    records = [r for work in results for r in summarise(work, results[work], shape)]
    return {
        "schema": 2,
        "date": datetime.date.today().isoformat(),
        "machine": start,
        "load_average_end": os.getloadavg(),
        "cpus_elsewhere_max": noise(results),
        "versions": versions,
        "threads": sorted({side["threads"] for side in sides}),
        "shape": shape,
        "sizes": dataclasses.asdict(SIZES[shape]),
        "records": records,
        "figures": figures(records),
        "missing": missing,
        "raw": results,
    }


def _print(report: dict[str, Any]) -> None:
    host, elsewhere = report["machine"], report["cpus_elsewhere_max"]
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    load = " -> ".join(f"{x[0]:.2f}" for x in (host["load_average"], report["load_average_end"]))
    print(markdown(report["records"], report["missing"]), *verdicts(report["figures"]), sep="\n")
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


def _interpreters(text: str) -> dict[str, str]:
    found = {}
    for item in text.split(","):
        name, _, python = item.partition("=")
        if name not in PEERS or not os.access(python, os.X_OK):
            raise argparse.ArgumentTypeError(
                f"{item!r} is not PEER=PYTHON with a peer of {', '.join(PEERS)} and a program"
            )
        found[name] = python
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--peer", type=_list_of(PEERS), default=PEERS, help=f"of {', '.join(PEERS)} (all)"
    )
    parser.add_argument(
        "--peer-python", type=_interpreters, default={}, help="PEER=PYTHON,... where not this one"
    )
    parser.add_argument(
        "--only", type=_list_of(tuple(WORKS)), default=tuple(WORKS), help=f"of {', '.join(WORKS)}"
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="timed repetitions a side")
    parser.add_argument("--json", type=Path, help="file for the whole report")
    parser.add_argument(
        "--model-shape", choices=("smollm2", "tiny"), default="smollm2", help="tiny is for tests"
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="of every work, on all sides")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # this process is a side
    return parser


def _run_side(job: Job) -> None:
    channel = Channel()
    module = importlib.import_module(SIDES[job.side][0])
    getattr(module, job.work)(job, channel)


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with status 1 where an installed peer could not be measured."""
    args = _parser().parse_args(argv)
    if args.job:
        return _run_side(Job(**json.loads(args.job)))
    pythons = {name: args.peer_python.get(name, sys.executable) for name in args.peer}
    absent = [name for name, python in pythons.items() if not is_installed(name, python)]
    start, results, missing, failures = machine(), {}, {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            work = WORKS[name]
            if args.dtype:
                work = dataclasses.replace(work, dtype=args.dtype)
            wanted = [s for s in work.beside if s in args.peer or s not in PEERS]
            sides = [s for s in wanted if s not in absent]
            results[name], failed = measure(
                work, args.model_shape, sides, args.repeats, scratch, pythons
            )
            missing[name] = {s: "not installed" for s in wanted if s in absent} | failed
            failures += [f"{name}: {why}" for why in failed.values()]
    report = _report(results, missing, args.model_shape, start) | {"dtype": args.dtype}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    _print(report)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
