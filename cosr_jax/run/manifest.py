"""Sealed lists of what a finished folder holds, so that later damage is seen and named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_SCHEMA = 1


class DamagedError(Exception):
    """A manifest that is absent, altered, or of an unknown schema; the text names the file."""


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flushes every file under ``folder`` to disk, then seals sizes, SHA-256 sums and ``facts``.

    The manifest appears whole or not at all, and never before the data it vouches for.

    Args:
      folder: finished; nobody else writes in it.
      facts: JSON-serialisable, returned by ``read``; "schema" and "files" are taken.

    Raises:
      OSError: the disk refuses.
    """
    files = {}
    for path in _files(folder):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync_directory(inner)
    replace_file(folder / NAME, _render({"schema": _SCHEMA, **facts, "files": files}))
    _sync_directory(folder.parent)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``.

    Raises:
      DamagedError: there is none, or it is not byte for byte what ``write`` wrote.
    """
    try:
        text = (folder / NAME).read_bytes().decode()
        content = json.loads(text)
        content.pop("seal")
        if text != _render(content):
            raise ValueError("its seal does not match its content")
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']} is not known")
    except FileNotFoundError as error:
        raise DamagedError(f"{NAME} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{NAME} is damaged ({error})") from error
    return content


def problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What differs from ``manifest``, as "FILE is missing" and the like; empty when sound.

    Every byte is read.  Files that the manifest does not list are not looked at.
    """
    found = []
    for name, expected in manifest["files"].items():
        try:
            with (folder / name).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != expected["bytes"]:
                    found.append(f"{name} has {size} bytes instead of {expected['bytes']}")
                elif hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                    found.append(f"{name} has the right size but other content than was saved")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def replace_file(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader, or a crash, sees the old file or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)


def _render(content: Mapping[str, Any]) -> str:
    # The seal makes a flipped bit in the manifest itself as visible as one in the data.
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, indent=1, sort_keys=True) + "\n"


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
