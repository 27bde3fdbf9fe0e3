"""Checkpoints of a run: device arrays and host state as one atomic, verifiable step.

The only module that knows Orbax (its v1 API, https://orbax.readthedocs.io).  Orbax writes a step
into a temporary folder and renames it when all processes are done; ``manifest`` then seals the
folder, and a step counts only with its seal.  Rotation is done here instead of by Orbax's
Checkpointer, because that one deletes old steps at the rename: a kill between rename and seal
would leave nothing to resume from.

Layout: ``DIRECTORY/00000012/{arrays/, host/data.json, manifest.json, ...}``.

Not tested: file systems other than a local POSIX one; more than two processes, and those only by
hand on one machine.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from cosr_jax.run import manifest
from cosr_jax.types import UserError

PyTree = Any

logger = logging.getLogger(__name__)

_ARRAYS, _HOST = "arrays", "host"
_STEP_FOLDER = re.compile(r"\d{8,}")
_LEFTOVER = re.compile(r"\d{8,}\.orbax-checkpoint-tmp.*")
_DISK_TROUBLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EIO: "check the disk",
}


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step as it was saved."""

    step: int
    arrays: PyTree  # structure, shapes, dtypes and shardings of the template
    host_state: dict[str, Any]


class CheckpointStore:
    """The ``keep`` latest steps and the best one, in one directory.

    Opening changes nothing on disk, so an evaluation may read the checkpoints of a live run.  The
    first ``save`` makes the directory and removes what a killed predecessor left half done; only
    one process group may save at a time (``workdir`` holds the lock).

    Every process of a multi-host run calls every method, on a shared file system; process 0 writes
    host state and manifests.

    Args:
      directory: local path; need not exist.
      keep: latest steps to keep, at least 1; the best is kept beside them.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._damaged: set[int] = set()  # found out by restore
        self._is_clean = False
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = -1
        self._finaliser = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        logging.getLogger("absl").addFilter(_is_worth_showing)

    def save(
        self, step: int, arrays: PyTree, host_state: dict[str, Any], is_best: bool = False
    ) -> None:
        """Starts saving one step and returns once the device arrays have been copied.

        The caller may donate ``arrays`` and change ``host_state`` right away.  Waits first for the
        save before this one.

        Args:
          step: at least 0, and greater than every step saved before.
          arrays: pytree of ``jax.Array``, typed PRNG keys included.
          host_state: JSON-serialisable; comes back as JSON has it (tuples as lists, keys as
            strings), floats bit-identical.
          is_best: from now on this is the best step: never deleted until another one is.

        Raises:
          UserError: the disk refused this save or the one before; earlier steps are intact.
          ValueError: ``step`` does not increase, or ``arrays`` has no leaves.
          TypeError: a leaf is no ``jax.Array``, or ``host_state`` does not fit JSON.
        """
        self.wait()
        named = _named_leaves(arrays)
        if not named:
            raise ValueError("arrays has no leaves")
        for name, leaf in named.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"arrays: {name} is a {type(leaf).__name__}, not a jax.Array")
        host_copy = json.loads(json.dumps(host_state))
        facts = {
            "step": step,
            "is_best": is_best,
            "arrays": {name: _signature(leaf) for name, leaf in named.items()},
        }
        latest = self.latest_step() if jax.process_index() == 0 else None
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not after the latest saved step {latest}")
        try:
            if jax.process_index() == 0:
                self._make_room(step)
            with _orbax_context():
                response = ocp.save_checkpointables_async(
                    self._folder(step),
                    {_ARRAYS: named, _HOST: host_copy},
                )
        except Exception as error:
            self._raise_for_disk(step, error)
            raise
        self._pending_step = step
        self._pending = self._finaliser.submit(self._finish, step, response, facts)

    def wait(self) -> None:
        """Blocks until the save under way, if any, is complete.

        Raises:
          UserError: the disk refused it; earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            self._raise_for_disk(self._pending_step, error)
            raise

    def close(self) -> None:
        """Waits, then ends the background thread.  Errors as in ``wait``."""
        try:
            self.wait()
        finally:
            self._finaliser.shutdown()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that was completed, or None.  Its bytes have not been checked yet."""
        return max(self._committed(), default=None)

    def best_step(self) -> int | None:
        """The newest completed step that was saved as the best, or None."""
        for step in sorted(self._committed(), reverse=True):
            try:
                if manifest.read(self._folder(step))["is_best"]:
                    return step
            except manifest.DamagedError:
                continue  # restore is where damage is reported
        return None

    def restore(self, template: PyTree, step: int | None = None) -> Restored:
        """Reads one step after checking all its bytes.

        Damaged steps newer than the one restored are named in a warning each, and replaced by
        the saves to come.

        Args:
          template: pytree of ``jax.Array`` or ``jax.ShapeDtypeStruct`` with the structure, shapes
            and dtypes that were saved; every leaf comes back with its template's sharding, on
            whatever devices that names (none: the default device).
          step: the step to read; None: the newest that is undamaged.

        Raises:
          UserError: nothing to restore, nothing undamaged, or ``template`` does not fit.
        """
        self.wait()
        chosen = self._choose_together(step)
        folder = self._folder(chosen)
        wanted = _named_leaves(template)
        self._check_fit(chosen, manifest.read(folder)["arrays"], wanted)
        abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
        with _orbax_context():
            loaded = ocp.load_checkpointables(folder, {_ARRAYS: abstract, _HOST: None})
        leaves = [_like(loaded[_ARRAYS][name], leaf) for name, leaf in wanted.items()]
        return Restored(
            chosen, jax.tree.unflatten(jax.tree.structure(template), leaves), loaded[_HOST]
        )

    def _folder(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _step_folders(self) -> dict[int, Path]:
        if not self.directory.is_dir():
            return {}
        return {int(p.name): p for p in self.directory.iterdir() if _STEP_FOLDER.fullmatch(p.name)}

    def _committed(self) -> list[int]:
        # A manifest that exists but cannot be read still counts: were it passed over here, a run
        # whose steps are all damaged would start afresh instead of stopping.
        return [
            step
            for step, folder in self._step_folders().items()
            if step not in self._damaged and (folder / manifest.NAME).exists()
        ]

    def _make_room(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # Orbax, refused half way through its set-up, leaves coroutines behind that nobody awaits.
        manifest.replace_file(self.directory / ".probe", "can this folder be written?")
        (self.directory / ".probe").unlink()
        if not self._is_clean:
            for path in self.directory.iterdir():
                is_unfinished = _STEP_FOLDER.fullmatch(path.name) and not (
                    (path / manifest.NAME).exists()
                )
                if is_unfinished or _LEFTOVER.fullmatch(path.name):
                    logger.info("removing unfinished checkpoint %s", path.name)
                    shutil.rmtree(path)
            self._is_clean = True
        if self._folder(step).exists():  # damaged, or latest_step would have known it
            _discard(self._folder(step))
        self._damaged.discard(step)  # what restore thought of it no longer holds

    def _finish(self, step: int, response: Any, facts: dict[str, Any]) -> None:
        folder = self._folder(step)
        try:
            response.result()
            if jax.process_index() == 0:
                manifest.write(folder, facts)
        except Exception:
            if jax.process_index() == 0:  # a full disk must not stay full of the failed attempt
                for path in self.directory.glob(f"{folder.name}*"):
                    shutil.rmtree(path, ignore_errors=True)
            raise
        if jax.process_index() == 0:
            self._rotate()

    def _rotate(self) -> None:
        kept = set(sorted(self._committed())[-self._keep :]) | {self.best_step()}
        for step, folder in self._step_folders().items():
            if step not in kept:
                _discard(folder)
                self._damaged.discard(step)

    def _choose_together(self, step: int | None) -> int:
        if jax.process_count() == 1:
            return self._choose(step)
        # Two processes that judged for themselves could resume from different steps.
        chosen, refusal = -1, None
        if jax.process_index() == 0:
            try:
                chosen = self._choose(step)
            except UserError as error:
                refusal = error
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if refusal is not None:
            raise refusal
        if chosen < 0:
            raise UserError("process 0 found no usable checkpoint", "see its message")
        return chosen

    def _choose(self, step: int | None) -> int:
        folders = self._step_folders()
        if step is not None:
            if step not in folders:
                raise UserError(
                    f"{self.directory} has no checkpoint of step {step}",
                    f"choose one of {sorted(self._committed())}",
                )
            if trouble := self._trouble(folders[step]):
                raise UserError(
                    f"checkpoint {folders[step]} is damaged: {trouble}",
                    f"choose another of {sorted(self._committed())}",
                )
            return step
        if not folders:
            raise UserError(f"{self.directory} has no checkpoints", "train first")
        for candidate in sorted(folders, reverse=True):
            trouble = self._trouble(folders[candidate])
            if not trouble:
                return candidate
            logger.warning("skipping checkpoint %s: %s", folders[candidate], trouble)
            self._damaged.add(candidate)
        raise UserError(
            f"none of the checkpoints in {self.directory} is usable (steps {sorted(folders)}; "
            f"the last one tried: {trouble})",
            "restore the folder from a copy, or start in a new workdir",
        )

    def _trouble(self, folder: Path) -> str:
        try:
            found = manifest.problems(folder, manifest.read(folder))
        except manifest.DamagedError as error:
            return str(error)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return found[0] + more if found else ""

    def _check_fit(self, step: int, saved: dict[str, str], wanted: dict[str, Any]) -> None:
        asked = {name: _signature(leaf) for name, leaf in wanted.items()}
        differing = [n for n in sorted(saved | asked) if saved.get(n) != asked.get(n)]
        if differing:
            name = differing[0]
            more = f" (and {len(differing) - 1} more arrays)" if len(differing) > 1 else ""
            raise UserError(
                f"checkpoint {self._folder(step)} does not fit the config: {name} is "
                f"{saved.get(name, 'absent')} there and {asked.get(name, 'absent')} here{more}",
                "use the config it was saved with, or a new workdir",
            )

    def _raise_for_disk(self, step: int, error: Exception) -> None:
        """Raises a UserError if ``error`` comes from the disk.

        TensorStore reports its errors as ValueError, with the system's message in the text.
        """
        codes = [code for code in _DISK_TROUBLE if os.strerror(code) in str(error)]
        if isinstance(error, OSError) and error.errno is not None:
            codes.insert(0, error.errno)
        if codes:
            remedy = _DISK_TROUBLE.get(codes[0], "mend the folder")
            raise UserError(
                f"checkpoint of step {step} could not be written to {self.directory}: "
                f"{os.strerror(codes[0])}",
                f"{remedy} and run the same command again; "
                f"the latest saved step is {self.latest_step()}",
            ) from error


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    # Flat names keep the files independent of the containers, and of how Orbax treats them.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(loaded: jax.Array, leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array) or leaf.committed:
        return loaded
    # Committed to one device, a scalar could no longer meet arrays sharded over a mesh.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(loaded))
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(loaded))


def _orbax_context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_HOST)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _discard(folder: Path) -> None:
    # Manifest first: a kill half way must leave an unfinished step, not a damaged one.
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Orbax logs about 60 lines a save, and prints each failure thrice before it raises it."""
    path = Path(record.pathname)
    if "orbax" not in path.parts:
        return True
    return record.levelno >= logging.WARNING and path.name != "future.py"
