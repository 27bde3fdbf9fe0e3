"""Safetensors folders in Hugging Face's layout: lazy reads by slice, sharded writes."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cosr_jax.types import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file is missing, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file", "name a folder with config.json and safetensors"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})", "get the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object", "get the file again")
    return values


class TensorFolder:
    """The tensors of ``model.safetensors``, or else of the files that an index names.

    Nothing is read before ``read``, and then only the slice asked for.

    Args:
      folder: where the files are.

    Raises:
      UserError: a file is missing, truncated or of another format, or lacks a tensor that the
        index puts there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
            located = read_json(folder / INDEX_NAME).get("weight_map")
            if not isinstance(located, dict):
                raise UserError(
                    f"{folder / INDEX_NAME}: key 'weight_map' is missing", "get the file again"
                )
            for name, file in located.items():
                if not isinstance(file, str):
                    raise UserError(
                        f"{folder / INDEX_NAME}: weight_map puts {name!r} into {file!r:.100}, "
                        "which is no file name",
                        "get the file again",
                    )
            files = {name: open_safetensors(folder / name) for name in set(located.values())}
            for name, file in located.items():
                if name not in files[file].keys():  # noqa: SIM118 (no mapping)
                    raise UserError(
                        f"{folder / file}: tensor {name!r} is missing", "get the file again"
                    )
            self._files = {name: files[file] for name, file in located.items()}
        else:
            single = open_safetensors(folder / SINGLE_NAME)
            self._files = {name: single for name in single.keys()}  # noqa: SIM118

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Stored dtype of a tensor as safetensors calls it, e.g. "BF16"."""
        return self._files[name].get_slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        """Stored size of a tensor in bytes."""
        bits = re.search(r"\d+", self.dtype(name))  # "BOOL" has none, and a byte
        return math.prod(self.shape(name)) * (int(bits[0]) // 8 if bits else 1)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at ``index``, in its stored dtype."""
        return self._files[name].get_slice(name)[index or (slice(None),)]


def open_safetensors(path: Path) -> Any:
    """An open safetensors file that gives NumPy arrays.

    Raises:
      UserError: the file is missing, truncated or of another format.
    """
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file", "name a folder with config.json and safetensors"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: truncated, or no safetensors file ({error})", "get the file again"
        ) from error


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 2 << 30
) -> None:
    """Writes tensors as they come, holding at most about ``shard_bytes`` of them in memory.

    Args:
      folder: an existing folder.
      tensors: name and value; any dtype that safetensors knows, bfloat16 included.
      shard_bytes: a new file is begun when one would grow over this.
    """
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    total = 0
    for name, value in tensors:
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(value)
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_NAME)
        return
    located = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        located.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": located}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


@contextlib.contextmanager
def building(target: Path, replace: bool = False) -> Iterator[Path]:
    """A fresh folder that becomes ``target`` when the block ends well and vanishes otherwise.

    Readers see the whole folder or none.

    Args:
      target: the folder to make.
      replace: whether a non-empty ``target`` gives way.

    Raises:
      UserError: ``target`` exists and is not empty, and ``replace`` is False.
    """
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists", "remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(Path(scratch) / "old")
        fresh.rename(target)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's and the generation settings' files from one folder to another."""
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
    ):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
