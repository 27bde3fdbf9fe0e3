"""``cosr doctor``: whether this machine can hold a run, a line for each thing a run needs."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from cosr_jax.config import VerifierConfig
from cosr_jax.run.checks import Check, ask_all
from cosr_jax.run.plan import COMPILE_ONLY
from cosr_jax.student.sources import cache_dir
from cosr_jax.types import Completion, Outcome, Task, UserError
from cosr_jax.verifiers.pool import VerifierPool
from cosr_jax.verifiers.sandbox.layers import LAYERS
from cosr_jax.verifiers.sandbox.probe import probe

#: What the launchers that JAX knows set, and how jax.distributed.initialize() then finds its peers.
_CLUSTERS = {
    "SLURM": "SLURM_JOB_ID",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
    "multi-slice TPU": "MEGASCALE_COORDINATOR_ADDRESS",
    "Kubernetes": "KUBERNETES_SERVICE_HOST",
}
_GIB = 2**30
_TOPOLOGY = "v5e:2x2"


def doctor(workdir: Path | None = None) -> int:
    """Prints what was found and returns the exit code: 0, or 1 where something has to be mended.

    Args:
      workdir: the folder a run is meant for; None checks the current one.
    """
    return ask_all(checks(workdir))


def checks(workdir: Path | None) -> tuple[Check, ...]:
    """All questions, cheap ones first."""
    return (
        Check("versions", versions),
        Check("devices", devices),
        Check("cluster", lambda: cluster(os.environ)),
        Check("memory", memory),
        Check("workdir", lambda: writable(workdir or Path())),
        Check("students", students),
        Check("curator", lambda: "built-in procedural; --curator=URL checks a model's server"),
        Check("verifier", verifier),
        Check("sandbox", sandbox),
        Check("topology", topology),
    )


def versions() -> str:
    """Python's and the numerical packages' versions."""
    packages = ("cosr-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def devices() -> str:
    """The accelerators that JAX sees.

    Raises:
      UserError: JAX cannot start its backend.
    """
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot start: {' '.join(str(error).split())}",
            "install the extra for this machine (tpu, cuda12, cuda13), or set JAX_PLATFORMS=cpu",
        ) from error
    kind = found[0].device_kind
    return f"{len(found)} x {kind} ({jax.default_backend()}), {os.cpu_count()} CPU cores"


def cluster(environment: Mapping[str, str]) -> str:
    """The launcher whose variables are set, as JAX's discovery will find it."""
    for name, variable in _CLUSTERS.items():
        if variable in environment:
            return f"{name} ({variable} is set)"
    return "single process"


def memory() -> str:
    """Memory of the host and, where JAX tells it, of one device."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"host {total / _GIB:.1f} GiB"
    # The CPU backend has no statistics of its own: it lives in host memory.
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        text += f", each device {stats['bytes_limit'] / _GIB:.1f} GiB"
    return text


def writable(workdir: Path) -> str:
    """That a run can write to ``workdir``, or make it.

    Raises:
      UserError: it cannot.
    """
    path = workdir.absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{nearest} cannot be written ({error.strerror})", "choose another --workdir"
        ) from error
    free = shutil.disk_usage(nearest).free / _GIB
    return f"{workdir} can be written, {free:.1f} GiB free"


def students() -> str:
    """Students in the cache; none is no fault, as a run fetches what it needs."""
    folder = cache_dir()
    found = sorted(config.parent.name for config in folder.glob("*/config.json"))
    if not found:
        return f"none in {folder} yet; the first run fetches its own"
    return f"{', '.join(found)} in {folder}"


def verifier() -> str:
    """That a verifier worker starts and judges: one right and one wrong answer.

    Raises:
      UserError: it does not.
    """
    # Only a symbolic comparison needs a worker: the two are equal, but not as text or numbers.
    task = Task("math", "doctor", 0.0, "", r"\frac{1}{\sqrt{2}}", key="doctor")
    cases = [
        (task, Completion((), (), rf"\boxed{{{answer}}}", "stop"))
        for answer in (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}")
    ]
    started = time.monotonic()
    with VerifierPool(VerifierConfig(workers=1)) as pool:
        verdicts = pool.judge(cases)
    outcomes = [verdict.outcome for verdict in verdicts]
    if outcomes != [Outcome.PASS, Outcome.FAIL]:
        details = "; ".join(v.detail for v in verdicts if v.detail)
        raise UserError(
            f"a worker judged a right and a wrong answer as {[o.value for o in outcomes]} "
            f"({details})",
            "reinstall sympy",
        )
    return f"a worker started and judged in {time.monotonic() - started:.1f} s"


def sandbox() -> str:
    """The isolation layers, each tried out.  Having none is a fault only for tasks with programs,
    which are then refused with the remedy.
    """

    async def tried() -> dict[str, str]:
        return {layer.name: await probe(layer.name) for layer in LAYERS}

    faults = asyncio.run(tried())
    working = [name for name, fault in faults.items() if not fault]
    found = f"{', '.join(working)} work" if working else "no layer works: no program can be judged"
    missing = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
    return f"{found} ({missing})" if missing else found


def topology() -> str:
    """Whether programs can be compiled for TPU pods that are not here.

    It is asked of a process of its own: libtpu writes to stderr as it likes, and keeps the
    machine's TPU, if there is one, for the process that loads it.

    Raises:
      UserError: the compiler is installed but does not start.
    """
    if importlib.util.find_spec("libtpu") is None:
        return "no TPU compiler; cosr plan --topology needs pip install 'cosr-jax[topology]'"
    code = (
        "from jax.experimental import topologies as t; "
        f"t.get_topology_desc(platform='tpu', topology_name={_TOPOLOGY!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**COMPILE_ONLY, **os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"libtpu does not give {_TOPOLOGY} ({reason})", "reinstall the topology extra"
        )
    return f"the TPU compiler is here: cosr plan --topology={_TOPOLOGY} works without a TPU"
