"""``cosr export``: a run's adapters for PEFT, or merged into a folder for transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.workdir import read_config
from cosr_jax.student.model import abstract_student
from cosr_jax.student.peft import export_adapter, export_merged
from cosr_jax.student.sources import is_hub_id, resolve_source
from cosr_jax.student.text_part import is_wrapped
from cosr_jax.student.weights import load_base, load_config
from cosr_jax.train.step import init_state
from cosr_jax.types import UserError


def export(
    workdir: Path,
    format: Literal["peft", "merged"],
    step: Literal["best", "latest"] | int = "best",
    out: Path | None = None,
) -> Path:
    """Writes a checkpoint's student for other programs, and prints where.

    Args:
      workdir: of the run; only read.
      format: a PEFT adapter, or a folder with the adapters merged into the weights.
      step: which checkpoint.
      out: folder to make; None is WORKDIR/export/FORMAT, where an earlier export gives way.

    Returns:
      The folder written.

    Raises:
      UserError: no such run or checkpoint, a source that is gone, or ``out`` is not empty.
    """
    config = read_config(workdir)
    store = CheckpointStore(workdir / "checkpoints", config.checkpoint.keep)
    source = config.student.source
    folder = resolve_source(source)
    student = abstract_student(load_config(source), config.student, config.lora)
    with store:
        template = jax.eval_shape(lambda lora: init_state(lora, config.train), student.lora)
        restored = store.restore(template, _step_number(store, step))
    student = dataclasses.replace(student, lora=restored.arrays.lora)
    target = out or workdir / "export" / format
    if format == "peft":
        base_name = source if is_hub_id(source) else str(folder.resolve())
        wrapped = is_wrapped(folder)
        export_adapter(student, config.lora, target, base_name, out is None, wrapped)
    else:
        student = dataclasses.replace(student, base=load_base(student, folder))
        export_merged(student, config.lora, target, folder, replace=out is None)
    print(f"{target}: {format} export of step {restored.step}")
    return target


def _step_number(store: CheckpointStore, step: Literal["best", "latest"] | int) -> int | None:
    if isinstance(step, int):
        return step
    best = store.best_step() if step == "best" else None
    if step == "best" and best is None and store.latest_step() is not None:
        raise UserError(
            f"{store.directory} has no best checkpoint yet", f"write --step={store.latest_step()}"
        )
    return best
