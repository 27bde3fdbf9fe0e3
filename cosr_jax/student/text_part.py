"""The text model inside a multimodal checkpoint: its part of config.json and of the tensors.

transformers saves ``Gemma3ForConditionalGeneration`` with the text model's tensors under
``language_model.`` (``language_model.model.norm.weight``), in some versions under
``model.language_model.``, beside those of the vision tower, of which a student of text has no use.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosr_jax.student.tensor_files import TensorFolder, read_json
from cosr_jax.types import UserError

#: model_type of a wrapper -> that of the text model in its "text_config", and the latter's class.
WRAPPERS = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}

#: Prefix in the file -> prefix of the text model alone; the first that fits counts.
_TEXT = (("model.language_model.", "model."), ("language_model.", ""))
#: Where modules of the text model are inside a wrapper that transformers (from 4.52) has loaded.
MODULES_INSIDE = "model.language_model."
#: Tensors of the other parts.
_OTHERS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")

#: Seconds between two lines of progress at least.
EVERY_S = 3.0

_log = logging.getLogger(__name__)


def alone(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone; what comes in where nothing is wrapped.

    Raises:
      UserError: a wrapper without a text model that is supported.
    """
    if values.get("model_type") not in WRAPPERS:
        return dict(values)
    family, architecture = WRAPPERS[values["model_type"]]
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise UserError(
            f"config.json: model_type {values['model_type']!r} has no object text_config",
            "take the file that came with the weights",
        )
    if text.get("model_type", family) != family:
        raise UserError(
            f"config.json: text_config of model_type {text['model_type']!r} is not supported",
            f"use a student whose text_config is of {family}",
        )
    shared = {k: values[k] for k in ("tie_word_embeddings", "quantization_config") if k in values}
    return {"model_type": family, **shared, **text, "architectures": [architecture]}


def read_text_config(folder: Path) -> dict[str, Any]:
    """The text model's part of a folder's config.json.

    Raises:
      UserError: there is none that can be read.
    """
    return alone(read_json(folder / "config.json"))


def is_wrapped(folder: Path) -> bool:
    """Whether a folder holds a text model inside a wrapper."""
    return read_json(folder / "config.json").get("model_type") in WRAPPERS


def inside(module: str) -> str:
    """A module of the text model as it is called in a loaded wrapper, e.g. "model.norm"."""
    return MODULES_INSIDE + module.removeprefix("model.")


class TextFolder:
    """The text model's tensors of a folder, under the names that they have without a wrapper.

    What belongs to the other parts is passed over, and the log says so.

    Args:
      files: all tensors.
      tell: gets a line on how far the reading has come, at most every ``EVERY_S`` seconds, and one
        from ``report``.  A host of a pod reads its own part of each tensor, so that its bytes stay
        below their sum.
    """

    def __init__(self, files: TensorFolder, tell: Callable[[str], None] | None = None):
        self._files, self.folder = files, files.folder
        self._stored = {name: name for name in files.names}
        self._tell, self._told = tell, time.monotonic()
        self._read: set[str] = set()
        self._read_bytes = 0
        if any(name.startswith(prefix) for name in files.names for prefix, _ in _TEXT):
            others = {name for name in files.names if _OTHERS.fullmatch(name)}
            self._stored = {_own_name(name): name for name in files.names - others}
            _log.warning(
                "%s: %d tensors of other parts than the text model are passed over (%s)",
                self.folder,
                len(others),
                ", ".join(sorted({name.partition(".")[0] for name in others})) or "none",
            )

    @property
    def names(self) -> frozenset[str]:
        """Names of the text model's tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._files.shape(self._stored[name])

    def dtype(self, name: str) -> str:
        """Stored dtype of a tensor as safetensors calls it."""
        return self._files.dtype(self._stored[name])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at ``index``, in its stored dtype."""
        value = self._files.read(self._stored[name], index)
        self._read.add(name)
        self._read_bytes += value.nbytes
        if time.monotonic() - self._told >= EVERY_S:
            self.report()
        return value

    def report(self) -> None:
        """Tells how many tensors and bytes were read."""
        self._told = time.monotonic()
        if self._tell is not None:
            whole = sum(self._files.nbytes(name) for name in self._stored.values())
            self._tell(
                f"read {len(self._read)} of {len(self._stored)} tensors of the student, "
                f"{self._read_bytes / 2**30:.2f} of {whole / 2**30:.2f} GiB"
            )


def _own_name(name: str) -> str:
    for prefix, replacement in _TEXT:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
