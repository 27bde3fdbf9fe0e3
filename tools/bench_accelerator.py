"""Measures the student's step and sampler on the accelerator that JAX finds, against its ceilings.

    python tools/bench_accelerator.py --json=accelerator.json --profile=DIR

One process, one device, a random student of Qwen2.5-1.5B's shape in bfloat16:

- ceilings: products of the student's shapes, and a copy;
- the LoRA SFT step: model FLOPs by formula (4 a weight and token, as frozen weights have no
  gradient; see ``bench_flops``) over those of the measured product ceiling: MFU;
- decoding, prefill apart: tokens/s, and the share of the floor that reading sets;
- a GRPO step by stages: rollout, verify, logprobs (as for a reference), train;
- the device's peak memory, where it tells.

``--shape=tiny`` runs in seconds on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_ours
import jax
from bench_flops import decode_bytes
from bench_report import machine
from bench_work import SIZES, Job, Recorder, clock, rollout_prompts

from cosr_jax.config import VerifierConfig
from cosr_jax.types import SamplingParams
from cosr_jax.verifiers.pool import VerifierPool

NOT_MEASURED = "not measured"


def medians(repetitions: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part."""
    return {part: statistics.median(r[part] for r in repetitions) for part in repetitions[0]}


def ceilings(job: Job, repeats: int) -> dict[str, float]:
    """What the device reaches: {part: FLOP/s or bytes/s}."""
    recorder = Recorder(repeats)
    bench_ours.ceiling(job, recorder)
    amounts = recorder.about["amounts"]
    return {part: amounts[part][0] / s for part, s in medians(recorder.seconds).items()}


def sft(job: Job, repeats: int, reached: dict[str, float]) -> dict[str, Any]:
    """The LoRA SFT step."""
    recorder = Recorder(repeats)
    bench_ours.sft(job, recorder)
    seconds = medians(recorder.seconds)["step"]
    rate = recorder.about["flops"]["step"] / seconds
    return {
        "seconds": seconds,
        "tokens_per_s": job.sizes.tokens("sft", "step") / seconds,
        "flops_per_s": rate,
        "mfu": rate / reached[f"products {job.dtype}"],
    }


def decode(job: Job, repeats: int, reached: dict[str, float]) -> dict[str, Any]:
    """Decoding alone: a rollout less one of a single token, by token."""
    setup, sizes = bench_ours.set_up(job), job.sizes
    prompts = rollout_prompts(setup.vocab, sizes)
    engine = bench_ours.sampler(setup, setup.tokens(), sizes.rollout_prompt_tokens)
    engine.set_adapters(setup.student.lora)

    def seconds(number: int) -> float:
        sampling = SamplingParams(number, temperature=1.0)
        runs = [clock(engine.generate, prompts, 1, sampling, s)[0] for s in range(repeats + 1)]
        return statistics.median(runs[1:])  # the first compiles

    new = sizes.rollout_new_tokens
    prefill_s = seconds(1)
    step_s = (seconds(new) - prefill_s) / (new - 1)
    context = sizes.rollout_prompt_tokens + new // 2
    width = jax.numpy.dtype(job.dtype).itemsize
    floor_s = decode_bytes(setup.student.config, len(prompts), context, width) / reached["copy"]
    return {
        "rows": len(prompts),
        "prefill_s": prefill_s,
        "step_s": step_s,
        "tokens_per_s": len(prompts) / step_s,
        "floor_step_s": floor_s,
        "share_of_floor": floor_s / step_s,
    }


def grpo(job: Job, repeats: int, pool: VerifierPool) -> dict[str, Any]:
    """A step's stages, in seconds, and their shares."""
    setup = bench_ours.set_up(job)
    work = bench_ours.GrpoWork(setup, job.sizes)

    def step(seed: int) -> dict[str, float]:
        stages = {}
        stages["rollout"], completions = clock(work.sample, seed)
        cases = [
            (bench_ours.task(i), dataclasses.replace(c, text=rf"\boxed{{{j % 2}}}"))
            for i, group in enumerate(completions)
            for j, c in enumerate(group)
        ]
        stages["verify"], verdicts = clock(pool.judge, cases)
        batch = work.batch(completions, verdicts)
        stages["logprobs"], _ = clock(lambda: jax.block_until_ready(work.scores(batch)))
        stages["train"], _ = clock(work.learn, batch)
        return stages

    seconds = medians([step(seed) for seed in range(repeats + 1)][1:])  # the first compiles
    total = sum(seconds.values())
    shares = {stage: value / total for stage, value in seconds.items()}
    return {"seconds": seconds, "step_s": total, "shares": shares}


def peak_memory() -> float | str:
    """GiB of the device's memory that have been in use at most."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "peak_bytes_in_use" not in stats:
        return NOT_MEASURED
    return stats["peak_bytes_in_use"] / 2**30


def measure(job: Job, repeats: int, profile: Path | None) -> dict[str, Any]:
    """Everything; ``peak_memory_gib`` is that of the process until the end of the work."""
    tracing = jax.profiler.trace(profile) if profile else contextlib.nullcontext()
    device = jax.local_devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.platform}: {device.device_kind}",
        "machine": machine(),
        "versions": {n: importlib.metadata.version(n) for n in ("cosr-jax", "jax", "jaxlib")},
        "shape": job.shape,
        "dtype": job.dtype,
        "sizes": dataclasses.asdict(job.sizes),
        "ceilings": ceilings(job, repeats),
    }
    with tracing, VerifierPool(VerifierConfig()) as pool:
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "sft": lambda: sft(job, repeats, report["ceilings"]),
            "decode": lambda: decode(job, repeats, report["ceilings"]),
            "grpo": lambda: grpo(job, repeats, pool),
        }
        for name, work in works.items():
            report[name] = {**work(), "peak_memory_gib": peak_memory()}
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    sizes, sft, decode, grpo = report["sizes"], report["sft"], report["decode"], report["grpo"]
    rates = ", ".join(f"{part} {rate:.3g}/s" for part, rate in report["ceilings"].items())
    stages = ", ".join(f"{stage} {share:.0%}" for stage, share in grpo["shares"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())

    def memory(part: dict[str, Any]) -> str:
        peak = part["peak_memory_gib"]
        return f"peak memory {peak if isinstance(peak, str) else f'{peak:.2f} GiB'}"

    return [
        f"{report['device']}; {report['shape']}, {report['dtype']}; {versions}",
        f"ceilings (FLOP, byte): {rates}",
        f"SFT step {sizes['sft_rows']} x {sizes['sft_tokens']}: {sft['seconds']:.4f} s, "
        f"{sft['tokens_per_s']:.0f} tokens/s, MFU {sft['mfu']:.1%} of the measured products; "
        f"{memory(sft)}",
        f"decoding {decode['rows']} rows: {decode['tokens_per_s']:.0f} tokens/s, "
        f"{decode['share_of_floor']:.1%} of the bandwidth floor; {memory(decode)}",
        f"GRPO step {grpo['step_s']:.3f} s: {stages}; {memory(grpo)}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the lines, and writes the whole report where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=tuple(SIZES), default="qwen2.5-1.5b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument(
        "--profile", type=Path, help="folder for a trace of everything but ceilings"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        job = Job("", "ours", args.shape, scratch, dtype=args.dtype)
        report = measure(job, args.repeats, args.profile)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    print("\n".join(lines(report)))


if __name__ == "__main__":
    main()
