"""From repetitions to records, tables and verdicts."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_work import SIZES, WORKS

Sides = Mapping[str, Mapping[str, Any]]  # side: what it said of itself, and its repetitions
Record = dict[str, Any]

#: figure: (needed, aimed at); see docs/performance.md for where they come from.
AT_LEAST = {
    "sft step: speed beside peft": (1.5, 1.8),
    "sft step: speed beside tunix": (1.6, 1.6),
    "sft step: memory of peft": (3.0, 5.0),
    "sft step: share of the ceiling": (0.0, 0.6),
    "sft-bf16 step: speed beside peft": (1.3, 1.7),
    "rollout: speed beside peft": (1.8, 1.8),
    "rollout: speed beside tunix": (1.2, 1.2),
    "rollout: speed beside vllm": (0.7, 1.0),
    "tail rollout: speed beside batches": (2.0, 3.0),
    "grpo step: speed beside trl": (1.8, 2.5),
    "grpo step: speed beside tunix": (1.4, 1.4),
}
AT_MOST = {
    "sft-2x: growth of time": (2.6, 2.1),
    "sft-4x: growth of time": (7.0, 4.5),
    "compile together, s": (5.0, 3.0),
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(work: str, sides: Sides, shape: str) -> list[Record]:
    """A record for each part and side: seconds, rate, ratio to ours, peak memory, first call.

    ``ratio`` is the other side's seconds over ours, repetition by repetition: over 1, ours is
    faster.  ``memory_ratio`` is its peak memory over ours.  ``flops`` are those of the formula.
    """
    records = []
    ours = sides["ours"]
    for part in ours["first"]:
        for name, side in sides.items():
            seconds = [r["seconds"][part] for r in side["repetitions"]]
            record: Record = {
                "work": work,
                "part": part,
                "side": name,
                "label": side["label"],
                "seconds": spread(seconds),
                "first_s": side["first"][part],
                "peak_rss_gib": _peak(side),
                "dtype": ours.get("dtype", WORKS[work].dtype),
                "flops": ours.get("flops", {}).get(part),
            }
            if not WORKS[work].is_first_call:
                amount, record["unit"] = _amount(work, part, side, shape)
                record["rate"] = amount / statistics.median(seconds)
            if name != "ours":
                pairs = zip(ours["repetitions"], seconds, strict=True)
                record["ratio"] = spread([other / r["seconds"][part] for r, other in pairs])
                record["memory_ratio"] = _peak(side) / _peak(ours)
            records.append(record)
    return records


def _peak(side: Mapping[str, Any]) -> float:
    return max(repetition["peak_rss_gib"] for repetition in side["repetitions"])


def _amount(work: str, part: str, side: Mapping[str, Any], shape: str) -> tuple[float, str]:
    """What one repetition does, and its unit."""
    if part in side.get("amounts", {}):
        return tuple(side["amounts"][part])
    return SIZES[shape].tokens(WORKS[work].function, part) * WORKS[work].length, "tokens"


def figures(records: Sequence[Record]) -> dict[str, float]:
    """What is read off the records: speed and memory beside others, shares, growth, compiling."""
    found = {}
    ours = {(r["work"], r["part"]): r for r in records if r["side"] == "ours"}
    for record in records:
        work, part, name = record["work"], record["part"], _name(record)
        if "ratio" in record:
            found[f"{name}: speed beside {record['side']}"] = record["ratio"]["median"]
            found[f"{name}: memory of {record['side']}"] = record["memory_ratio"]
        elif record["flops"]:
            rate = record["flops"] / record["seconds"]["median"]
            ceiling = ours.get(("ceiling", f"products {record['dtype']}"))
            found[f"{name}: GFLOP/s"] = rate / 1e9
            if ceiling:
                found[f"{name}: share of the ceiling"] = rate / ceiling["rate"]
            base = ours.get((WORKS[work].function, part))
            if WORKS[work].length > 1 and base:
                growth = record["seconds"]["median"] / base["seconds"]["median"]
                found[f"{work}: growth of time"] = growth
                found[f"{work}: growth of FLOPs"] = record["flops"] / base["flops"]
        elif WORKS[work].is_first_call:
            found[f"{name}, s"] = record["seconds"]["median"]
    return found


def verdicts(found: Mapping[str, float]) -> list[str]:
    """A line for each figure; those with a target say whether it is reached."""
    lines = []
    for name, value in found.items():
        line = f"{name}: {value:.2f}"
        for targets, sign in ((AT_LEAST, 1), (AT_MOST, -1)):
            if name in targets:
                needed, aim = targets[name]
                reached = "reached" if sign * value >= sign * needed else "not reached"
                bound = "at least" if sign > 0 else "at most"
                line += f" ({reached}: {bound} {needed:g} needed, {aim:g} aimed at)"
        lines.append(line)
    return lines


def markdown(records: Sequence[Record], missing: Mapping[str, Mapping[str, str]]) -> str:
    """The records as a table; ``missing`` is {work: {side: why there is nothing}}."""
    lines = [
        "| work | side | s, median (min..max) | per s | times as fast, ours | first call, s "
        "| peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        ratio = _words(r["ratio"]) if "ratio" in r else ""
        rate = f"{r['rate']:.4g} {r['unit']}" if "rate" in r else ""
        lines.append(
            f"| {_name(r)} | {r['label']} | {_words(r['seconds'])} | {rate} | {ratio} "
            f"| {r['first_s']:.2f} | {r['peak_rss_gib']:.2f} |"
        )
    for work, sides in missing.items():
        for side, why in sides.items():
            lines.append(f"| {work} | {side} | {why.splitlines()[-1]} | | | | |")
    return "\n".join(lines)


def _name(record: Record) -> str:
    work, part = record["work"], record["part"]
    return work if part == work else f"{work} {part}"


def _words(values: Mapping[str, float]) -> str:
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


def noise(results: Mapping[str, Sides]) -> float | None:
    """Most CPUs that other processes kept busy during any repetition; None where unknown."""
    found = [
        repetition["cpus_elsewhere"]
        for sides in results.values()
        for side in sides.values()
        for repetition in side["repetitions"]
    ]
    return None if None in found else max(found)
