"""Log-probabilities and entropies of completion tokens, without a [batch, time, vocab] array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cosr_jax import sharding
from cosr_jax.student.model import Decoder
from cosr_jax.train.batching import TrainBatch


def batch_logprobs(
    module: Decoder,
    batch: TrainBatch,
    temperature: float,
    chunk: int,
    *,
    adapters: bool = True,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the student says about the batch's completions.

    Only the positions that predict completion tokens are projected onto the vocabulary.

    Args:
      module: the student.
      batch: rows to read.
      temperature: logits are divided by it before the softmax.
      chunk: tokens whose logits exist at once.
      adapters: False asks the reference policy.
      dropout_key: of the adapters' dropout; None switches it off.

    Returns:
      float32 [rows, completion] log-probabilities (nats) and entropies (nats; these carry no
      gradient).  Values at padding are finite and mean nothing.
    """
    prompt, completion = batch.prompt_tokens.shape[1], batch.completion_tokens.shape[1]
    tokens = jnp.concatenate([batch.prompt_tokens, batch.completion_tokens], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
    mask = sharding.constrain(mask, "batch", "time").astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    tokens = sharding.constrain(tokens, "batch", "time")
    hidden = module(tokens, positions, mask, adapters, dropout_key)
    return completion_logprobs(
        hidden[:, prompt - 1 : prompt + completion - 1],
        module.head_kernel(),
        batch.completion_tokens,
        temperature,
        chunk,
    )


def completion_logprobs(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ kernel / temperature)[target] and the softmax's entropy, in chunks.

    The kernel is frozen: it receives no gradient, and neither does the entropy.  Then the
    gradient of each token's log-probability is one vector, kernel @ (onehot - softmax) /
    temperature, which the forward pass leaves behind in ``hidden``'s dtype; so the backward pass
    touches no logits, and the vocabulary costs two products rather than the three of
    recomputation.

    Args:
      hidden: [rows, time, hidden], in the compute dtype.
      kernel: [hidden, vocab].
      targets: int32 [rows, time].
      temperature: positive.
      chunk: tokens whose logits exist at once; time is cut so that ``rows`` x its piece stays
        under it, one column at least.

    Returns:
      float32 [rows, time] each.
    """
    rows, time, width = hidden.shape
    columns = max(1, min(time, chunk // rows))
    pieces = -(-time // columns)
    padding = pieces * columns - time
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    cut_hidden = jnp.moveaxis(hidden.reshape(rows, pieces, columns, width), 1, 0)
    cut_targets = jnp.moveaxis(targets.reshape(rows, pieces, columns), 1, 0)
    outputs = _in_pieces(
        cut_hidden.reshape(pieces, rows * columns, width),
        kernel,
        cut_targets.reshape(pieces, rows * columns),
        temperature,
    )

    def whole(values: jax.Array) -> jax.Array:
        stacked = values.reshape(pieces, rows, columns)
        return jnp.moveaxis(stacked, 0, 1).reshape(rows, pieces * columns)[:, :time]

    return whole(outputs[0]), whole(outputs[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_pieces(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """float32 [pieces, tokens] log-probabilities and entropies, one piece's logits at a time."""
    return jax.lax.map(lambda piece: _piece(*piece, kernel, temperature)[:2], (hidden, targets))


def _in_pieces_forward(hidden, kernel, targets, temperature):
    def piece(inputs):
        logprobs, entropy, softmax = _piece(*inputs, kernel, temperature)
        tokens, chosen = inputs
        onehot = jax.nn.one_hot(chosen, kernel.shape[1], dtype=softmax.dtype)
        pull = (onehot - softmax).astype(tokens.dtype) @ kernel.T.astype(tokens.dtype)
        return logprobs, entropy, pull / temperature

    logprobs, entropy, pull = jax.lax.map(piece, (hidden, targets))
    return (logprobs, entropy), pull


def _in_pieces_backward(temperature, pull, cotangents):
    along_logprobs, _ = cotangents
    return (along_logprobs[..., None] * pull).astype(pull.dtype), None, None


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)


def _piece(
    hidden: jax.Array, targets: jax.Array, kernel: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 log-probabilities [tokens], entropies [tokens] and softmax [tokens, vocab]."""
    logits = jnp.matmul(
        hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
    ) / jnp.float32(temperature)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = logits - log_normaliser
    softmax = jnp.exp(logprobs)
    chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
    return chosen, -(softmax * logprobs).sum(-1), softmax
