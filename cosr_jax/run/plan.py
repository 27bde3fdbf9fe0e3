"""``cosr plan``: compiles a run's train steps, without weights, and tells what they would occupy.

With a topology the real TPU compiler does it for chips that are not here; so the figures are
those of the pod, and a configuration that does not fit is refused by the compiler itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from cosr_jax.config import RunConfig, TrainConfig
from cosr_jax.sharding import make_mesh
from cosr_jax.student.lora import count_parameters
from cosr_jax.student.model import Student, abstract_student
from cosr_jax.student.weights import load_config
from cosr_jax.train.batching import BatchShape, TrainBatch, batch_shape
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import batch_shards, init_state, make_train_step
from cosr_jax.types import UserError

_GIB = 2**30
#: For a libtpu that only compiles.
COMPILE_ONLY = {
    # It asks a TPU machine's metadata server, waits, and complains, unless it knows already.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of no effect on the topology asked for
    # Compiling takes no chip, so it may go on beside a process that trains or compiles.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What a compiled step occupies on one device, in bytes, and what compiling took."""

    arguments: int  # weights, adapters, moments and batch
    temporary: int  # beyond them, while the step runs
    seconds: float

    @property
    def total(self) -> int:
        """Bytes while the step runs: outputs lie where the donated state was."""
        return self.arguments + self.temporary


def plan(config: RunConfig, topology: str | None = None) -> None:
    """Prints parameters, mesh, and each train step's memory at the longest lengths.

    Args:
      config: of the run; only the config.json of its student is read.
      topology: TPU chips to compile for, e.g. "v5e:4x4"; None: the devices that are here.

    Raises:
      UserError: the topology is unknown, the mesh does not fit it, or a step does not fit into
        the chips' memory.
    """
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config.mesh, devices)
    student = abstract_student(load_config(config.student.source), config.student, config.lora)
    trainable, frozen = count_parameters(student.lora), count_parameters(student.base)
    where = topology or "the devices here"
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"student    {config.student.source}", flush=True)
    print(f"parameters {trainable + frozen:,} in all, {trainable:,} trainable")
    print(f"mesh       {sizes} = {mesh.size} x {devices[0].device_kind} ({where})", flush=True)
    for name, objective, samples, group in _steps(config):
        shape = batch_shape(
            samples,
            config.train.microbatch_size,
            config.rollout.max_prompt_tokens,
            config.rollout.max_new_tokens,
            batch_shards(mesh),
        )
        dropout_seed = config.seed if config.lora.dropout > 0 else None
        try:
            memory = compile_step(
                student, objective, config.train, shape, mesh, dropout_seed, group
            )
        except jax.errors.JaxRuntimeError as error:
            raise explain(error, f"the {name} step on {where}") from error
        print(
            f"{name:10} {shape.rows} rows in microbatches of {shape.microbatch_rows}, "
            f"{shape.max_prompt} + {shape.max_completion} tokens: on each device "
            f"arguments {memory.arguments / _GIB:.2f}, temporary {memory.temporary / _GIB:.2f}, "
            f"together {memory.total / _GIB:.2f} GiB; {_verdict(memory, devices[0], topology)}; "
            f"compiled in {memory.seconds:.1f} s",
            flush=True,
        )


def compile_step(
    student: Student,
    objective: SftObjective | GrpoObjective,
    train: TrainConfig,
    shape: BatchShape,
    mesh: Mesh,
    dropout_seed: int | None = None,
    group: int = 1,
) -> StepMemory:
    """Compiles a train step at the shape's longest lengths; no value is computed or loaded.

    ``group`` is the number of samples of a task, which share their prompt where the shape allows.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses, e.g. for want of memory.
      UserError: the backend does not tell.
    """
    step = make_train_step(student, objective, train, mesh, dropout_seed)
    several = isinstance(objective, GrpoObjective) and objective.config.updates_per_batch > 1
    batch = abstract_batch(shape, several, objective.needs_reference, group)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    started = time.monotonic()
    state = jax.eval_shape(lambda lora: init_state(lora, train), student.lora)
    lowered = step.lower(state, student.base, batch, rate)
    stats = lowered.compile().memory_analysis()
    if stats is None:
        raise UserError(
            f"{mesh.devices.flat[0].platform} does not tell a program's memory",
            "use --topology, or a TPU, GPU or CPU backend",
        )
    return StepMemory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        time.monotonic() - started,
    )


def abstract_batch(
    shape: BatchShape, with_old_logprobs: bool, with_kl: bool = False, group: int = 1
) -> TrainBatch:
    """A batch of ``jax.ShapeDtypeStruct`` leaves at the shape's longest lengths."""
    prompt = (shape.rows // shape.group(group), shape.max_prompt)
    completion = (shape.rows, shape.max_completion)
    like: Any = jax.ShapeDtypeStruct
    return TrainBatch(
        like(prompt, jnp.int32),
        like(prompt, bool),
        like(completion, jnp.int32),
        like(completion, bool),
        like((shape.rows,), jnp.float32),
        like(completion, jnp.float32),
        like((), jnp.int32),
        like(completion, jnp.float32) if with_old_logprobs else None,
        like((), jnp.float32) if with_kl else None,
    )


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Compile-only devices of a TPU topology such as "v5e:4x4" (libtpu's names).

    Raises:
      UserError: libtpu is not installed, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: the TPU compiler (libtpu) is not installed",
            "pip install 'cosr-jax[topology]'",
        )
    for variable, value in COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    # Nothing runs here, so leave this machine's own accelerator to others.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology}: {_one_line(error)}", "write e.g. v5e:4x4, v5p:2x2x2 or v6e:2x4"
        ) from error
    return found.devices


def explain(error: jax.errors.JaxRuntimeError, what: str) -> UserError:
    """A compiler's refusal for want of memory, as the user can mend it.

    Raises:
      jax.errors.JaxRuntimeError: ``error`` itself, if it is about something else.
    """
    text = str(error)
    if not re.search(r"RESOURCE_EXHAUSTED|ran out of memory", text, re.IGNORECASE):
        raise error
    return UserError(
        f"{what} does not fit: {_one_line(error)}",
        "raise config.mesh.fsdp or tensor (with more chips), lower config.train.microbatch_size, "
        "or set config.student.param_dtype=bfloat16, or config.student.quantise=nf4",
    )


def _steps(config: RunConfig) -> list[tuple[str, SftObjective | GrpoObjective, int, int]]:
    """(name, objective, samples, samples of a task) of both train steps."""
    rollout = config.rollout
    group = rollout.num_generations
    samples = rollout.prompts_per_step * group
    grpo = GrpoObjective(config.grpo, rollout.temperature, samples * rollout.max_new_tokens)
    return [("grpo", grpo, samples, group), ("sft", SftObjective(), config.sft.batch_size, 1)]


def _verdict(memory: StepMemory, device: jax.Device, topology: str | None) -> str:
    if topology:
        return "fits"  # the compiler refuses what does not
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return "no limit known"
    return f"{'fits' if memory.total <= limit else 'DOES NOT FIT'} in {limit / _GIB:.2f} GiB"


def _one_line(error: Exception, limit: int = 240) -> str:
    return " ".join(str(error).split())[:limit]
