"""The one folder of a run: its layout, its lock, and the config it belongs to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

import yaml

from cosr_jax import config as config_lib
from cosr_jax.run import manifest
from cosr_jax.types import UserError


class Workdir:
    """Paths of a run's folder, and its exclusive lock until ``close``.

    Made by ``open_workdir``.
    """

    def __init__(self, path: Path, lock: TextIO):
        self.path = path
        self._lock = lock

    @property
    def config_file(self) -> Path:
        """The resolved config, as YAML."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """Sampled completions, as JSON lines."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_md(self) -> Path:
        return self.path / "report.md"

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_workdir(
    path: str | os.PathLike[str], config: config_lib.RunConfig, allow_config_change: bool = False
) -> Workdir:
    """Locks ``path`` for this process, makes its folders, and checks or saves the config.

    The lock is the kernel's (``flock``), so it ends with its holder however that dies.  In a
    multi-host run only process 0 opens the workdir.

    Args:
      path: the run's folder; made if absent.
      config: the resolved settings of this run.
      allow_config_change: where the folder's config differs, save the new one and keep the old as
        ``config.yaml.N`` instead of refusing.

    Raises:
      UserError: the folder is in use, not writable, remote, no folder, or belongs to another
        config (the message lists the differing keys).
    """
    if "://" in os.fspath(path):
        raise UserError(
            f"--workdir={path} is remote, which is not supported yet",
            "give a local or network-mounted folder and copy it afterwards",
        )
    root = Path(path).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir={path} is not a folder", "give another path") from error
    except OSError as error:
        raise _not_writable(path, error) from error
    with contextlib.ExitStack() as on_error:
        on_error.callback(lock.close)
        workdir = Workdir(root, lock)
        try:
            for folder in ("checkpoints", "tensorboard", "samples", "export"):
                (root / folder).mkdir(exist_ok=True)
            _settle_config(workdir.config_file, config, allow_config_change)
        except FileExistsError as error:
            raise UserError(f"{error.filename} is not a folder", "move it away") from error
        except OSError as error:
            raise _not_writable(path, error) from error
        on_error.pop_all()
    return workdir


def read_config(path: str | os.PathLike[str]) -> config_lib.RunConfig:
    """The config saved in workdir ``path``; takes no lock.

    Raises:
      UserError: there is none, it is damaged, or this version does not accept a value in it.
    """
    file = Path(path) / "config.yaml"
    try:
        return config_lib.from_config_dict(_read_yaml(file))
    except UserError as error:
        # An earlier version may have written it: "config.x" alone would name the wrong file.
        where = "" if str(file) in error.what else f"{file}: "
        raise UserError(f"{where}{error.what}", error.remedy) from error


def _lock(root: Path) -> TextIO:
    # Opened for appending: a failed attempt must not wipe the holder's name.
    lock = (root / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "a process that is just starting"
        lock.close()
        raise UserError(
            f"--workdir={root} is in use by {holder}", "wait for it, stop it, or give another path"
        ) from error
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    # A forked worker that outlives a killed run would otherwise hold the lock on.
    os.register_at_fork(after_in_child=lock.close)
    return lock


def _settle_config(file: Path, config: config_lib.RunConfig, allow_change: bool) -> None:
    new = config_lib.to_dict(config)
    if file.exists():
        old = _read_yaml(file)
        differing = config_lib.differing_keys(old, new)
        if not differing:
            return
        if not allow_change:
            raise UserError(
                f"{file} belongs to a run with another config: {'; '.join(differing)}",
                "use that config, another --workdir, or --allow_config_change",
            )
        taken = [
            int(p.suffix[1:]) for p in file.parent.glob("config.yaml.*") if p.suffix[1:].isdigit()
        ]
        manifest.replace_file(
            file.with_name(f"config.yaml.{max(taken, default=0) + 1}"), file.read_text("utf-8")
        )
    manifest.replace_file(file, yaml.safe_dump(new, sort_keys=False, allow_unicode=True))


def _read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist", "give the workdir of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged ({first_line})", "restore it from a copy") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged (no mapping in it)", "restore it from a copy")
    return content


def _not_writable(path: str | os.PathLike[str], error: OSError) -> UserError:
    return UserError(
        f"--workdir={path} cannot be written ({error.strerror})", "give a folder that you may write"
    )
