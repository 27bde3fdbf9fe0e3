"""Runs of the closed loop that take seconds, and what has to be equal between two of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosr_jax.config import RunConfig, from_config_dict
from cosr_jax.run import manifest
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.metrics import deterministic

#: A guard against hanging for ever; an idle machine needs some twenty seconds.
TIMEOUT_S = 900

#: Three rounds of three steps: a format drill by SFT, then GRPO.
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "lora": {"rank": 4, "alpha": 8.0},
    "tasks": {"skills": ("counting",), "max_level": 1},
    # A quarter of the answers has the form at first, four fifths after a drill; and a lucky half
    # of right values counts as mastered, so that no worked answers are studied after it.
    "curator": {
        "format_target": 0.5,
        "zone_high": 0.4,
        "min_informative": 0.15,
        "replay_fraction": 0.25,
    },
    "rollout": {
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_new_tokens": 16,
        "max_prompt_tokens": 96,
    },
    "sft": {"batch_size": 4},
    "train": {
        "learning_rate": 5e-3,
        "sft_learning_rate": 2e-2,
        "microbatch_size": 8,
        "max_rounds": 3,
        "steps_per_round": 3,
    },
    "eval": {"test": ("test=counting/1:16",), "validation": "counting/1:16", "bootstrap": 100},
    "checkpoint": {"every_steps": 2},
}


def settings(student: Path, **sections: Any) -> dict[str, Any]:
    """``SETTINGS`` for the student in this folder, with sections updated."""
    values = {**SETTINGS, "student": {"source": str(student)}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def tiny_config(student: Path, **sections: Any) -> RunConfig:
    return from_config_dict(settings(student, **sections))


#: Runs ``cosr`` and, unless ``place`` is "nowhere", kills it as it enters a call for the n-th time.
_KILLED = """
import os, signal, sys
from cosr_jax.main import main
from cosr_jax.run import loop, manifest
from cosr_jax.run.checkpoint import CheckpointStore
place, count = sys.argv[1], int(sys.argv[2])
owner, name = {
    "nowhere": (loop, "main"),
    "update": (loop.Run, "update"),
    "save": (CheckpointStore, "save"),
    "seal": (manifest, "write"),
    "plan": (loop.Run, "plan_round"),
    "report": (loop, "write_report"),
}[place]
original, calls = getattr(owner, name, None), 0
def counting(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, counting)
sys.exit(main(sys.argv[3:]))
"""


def start(
    values: dict[str, Any], workdir: Path, cache: Path, place: str = "nowhere", count: int = 1
) -> subprocess.Popen[str]:
    """``cosr train`` in a process of its own, on one device; stdout is a pipe."""
    config = workdir.with_suffix(".py")
    config.write_text(
        "from cosr_jax.config import default_config\n"
        "def get_config(arg=''):\n"
        "    config = default_config()\n"
        f"    config.update({values!r})\n"
        "    return config\n",
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    arguments = ["train", f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, place, str(count), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits; returns stderr.  The exit code has to be ``code``."""
    with process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == code, (process.returncode, out, err)
    return err


def saved_steps(workdir: Path) -> dict[int, dict[str, Any]]:
    """Everything that the checkpoints hold, by step: arrays as bytes, host state without clocks."""
    found: dict[int, dict[str, Any]] = {}
    with CheckpointStore(workdir / "checkpoints", 1) as store:
        for folder in sorted((workdir / "checkpoints").glob("0*")):
            facts = manifest.read(folder)
            template = {name: _template(signature) for name, signature in facts["arrays"].items()}
            restored = store.restore(template, facts["step"])
            host = restored.host_state
            host["loop"].pop("wall_s")
            arrays = {name: np.asarray(x).tobytes() for name, x in restored.arrays.items()}
            found[facts["step"]] = {"arrays": arrays, "is_best": facts["is_best"], "host": host}
    return found


def _template(signature: str) -> jax.ShapeDtypeStruct:
    """From "float32[2,3]"."""
    dtype, shape = signature.rstrip("]").split("[")
    return jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], jnp.dtype(dtype))


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The metrics history without its clocks."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [deterministic(json.loads(line)) for line in lines]


def report(workdir: Path) -> dict[str, Any]:
    """report.json without its clock."""
    content = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    assert content.pop("wall_s") > 0
    return content


def assert_same_run(
    one: Path, other: Path, saved: Callable[[Path], dict[int, Any]] = saved_steps
) -> None:
    """Bit for bit: checkpoints, training samples in their order, metrics and report."""
    assert (one / "samples/train.jsonl").read_bytes() == (
        other / "samples/train.jsonl"
    ).read_bytes()
    assert metrics(one) == metrics(other)
    assert saved(one) == saved(other)
    assert report(one) == report(other)
