"""Tiny students, and what transformers computes with them.

The figures are in tests/data and come from tools/make_references.py.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.model import Student, merge
from cosr_jax.student.weights import load_student

DATA = Path(__file__).resolve().parent / "data"
TINY_NAMES = ("tiny_llama", "tiny_llama3")
FAMILIES = tuple(
    f"family_{name}" for name in ("qwen2", "qwen3", "smollm3", "gemma3", "qwen3_moe", "gpt_oss")
)
LORA = LoraConfig(rank=4, alpha=8.0)


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def tiny_config(name: str) -> dict:
    """What config.json holds."""
    return json.loads(str(reference(name)["config"]))


def tiny_weights(name: str) -> dict[str, np.ndarray]:
    """float32, or packed uint8, under Hugging Face's names."""
    return {
        key.removeprefix("weights/"): value if value.dtype == np.uint8 else value.astype(np.float32)
        for key, value in reference(name).items()
        if key.startswith("weights/")
    }


def write_folder(folder: Path, name: str) -> Path:
    """The Hugging Face folder of a tiny student."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(name)), encoding="utf-8")
    save_file(tiny_weights(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def tiny_student(name: str = "tiny_llama") -> Student:
    """Loaded once for all tests; fresh adapters on every linear."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), name)
        return load_student(StudentConfig(source=folder), LORA)


def stirred(lora: nnx.State, seed: int = 0) -> nnx.State:
    """Adapters far from their start values."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.1, x.shape), x.dtype), lora)


_forwards: dict[int, Callable[..., jax.Array]] = {}


def _forward(graphdef: nnx.GraphDef) -> Callable[..., jax.Array]:
    """Compiled once for each graph; the closure keeps the graph, and so its id, alive."""

    @functools.partial(jax.jit, static_argnames="adapters")
    def logits(lora, base, tokens, positions, segment_ids, adapters):
        module = merge(graphdef, lora, base)
        return module.logits(module(tokens, positions, segment_ids, adapters))

    return _forwards.setdefault(id(graphdef), logits)


def run(student: Student, tokens, positions=None, segment_ids=None, adapters=True, lora=None):
    """float32 logits [batch, time, vocab]; plain rows unless told otherwise."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    lora = student.lora if lora is None else lora
    layout = jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids, jnp.int32)
    return np.asarray(
        _forward(student.graphdef)(lora, student.base, tokens, *layout, adapters=adapters)
    )
