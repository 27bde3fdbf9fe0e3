"""Log-probabilities and entropies of completion tokens, without a [batch, time, vocab] array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cosr_jax import sharding
from cosr_jax.student.model import Decoder
from cosr_jax.student.routing import RouterLoad
from cosr_jax.train.batching import TrainBatch
from cosr_jax.train.vocabulary import softmax_stream


def batch_logprobs(
    module: Decoder,
    batch: TrainBatch,
    temperature: float,
    chunk: int,
    *,
    adapters: bool = True,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, RouterLoad | None]:
    """What the student says about the batch's completions.

    Only the positions that predict completion tokens are projected onto the vocabulary.  Prompts
    that rows share are computed once, forward and backward (``Decoder.continuations``).

    Args:
      module: the student.
      batch: rows to read.
      temperature: logits are divided by it before the softmax.
      chunk: tokens whose logits exist at once.
      adapters: False asks the reference policy.
      dropout_key: of the adapters' dropout; None switches it off.

    Returns:
      float32 [rows, completion] log-probabilities (nats) and entropies (nats; these carry no
      gradient).  Values at padding are finite and mean nothing.  Then the load of the routers by
      layer, over the tokens of all rows; None where the student has no experts.
    """
    if batch.group > 1:
        hidden, load = module.continuations(
            batch.prompt_tokens,
            batch.prompt_mask,
            batch.completion_tokens,
            batch.completion_mask,
            adapters,
            dropout_key,
        )
    else:
        prompt, completion = batch.prompt_tokens.shape[1], batch.completion_tokens.shape[1]
        tokens = jnp.concatenate([batch.prompt_tokens, batch.completion_tokens], axis=1)
        mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
        mask = sharding.constrain(mask, "batch", "time").astype(jnp.int32)
        # Real tokens stand together, so a count serves; a running sum takes long to compile.
        padding = (~batch.prompt_mask).sum(1, dtype=jnp.int32, keepdims=True)
        positions = jnp.maximum(jnp.arange(mask.shape[1])[None] - padding, 0)
        tokens = sharding.constrain(tokens, "batch", "time")
        hidden, load = module.routed(tokens, positions, mask, adapters, dropout_key)
        hidden = hidden[:, prompt - 1 : prompt + completion - 1]
    logprobs, entropy = completion_logprobs(
        hidden,
        module.head_kernel(),
        batch.completion_tokens,
        temperature,
        chunk,
        module.config.logit_softcap,
    )
    return logprobs, entropy, load


def completion_logprobs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ kernel / temperature)[target] and the softmax's entropy, in chunks.

    The kernel is frozen: it receives no gradient, and neither does the entropy.  Then the
    gradient of each token's log-probability is one vector, kernel @ (onehot - softmax) /
    temperature, which the forward pass leaves behind in ``hidden``'s dtype; so the backward pass
    touches no logits, and the vocabulary costs two products rather than the three of
    recomputation (``vocabulary.softmax_stream``).

    Args:
      hidden: [rows, time, hidden], in the compute dtype.
      kernel: [hidden, vocab].
      targets: int32 [rows, time].
      temperature: positive.
      chunk: tokens whose logits exist at once; time is cut so that ``rows`` x its piece stays
        under it, one column at least.
      softcap: of the logits, before the temperature (``project``); its slope, 1 - (logit /
        softcap)^2, is then in the vector too.  0.0: none.

    Returns:
      float32 [rows, time] each.
    """
    rows, time = targets.shape
    columns = max(1, min(time, chunk // rows))
    pieces = -(-time // columns)
    padding = pieces * columns - time

    def cut(x: jax.Array) -> jax.Array:  # [rows, time, ...] -> [pieces, rows, columns, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(rows, pieces, columns, *x.shape[2:]), 1, 0)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def join(x: jax.Array) -> jax.Array:  # [pieces, rows, columns] -> [rows, time]
        return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * columns)[:, :time]

    logprobs, entropy = _in_pieces(cut(hidden), kernel, cut(targets), temperature, softcap)
    return join(logprobs), join(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_pieces(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, temperature: float, softcap: float
) -> tuple[jax.Array, jax.Array]:
    """float32 [pieces, rows, columns] log-probabilities and entropies, a piece at a time."""
    values = _stream(hidden, kernel, targets, temperature, softcap, with_pull=False)
    return values[0], values[1]


def _in_pieces_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, temperature: float, softcap: float
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    logprobs, entropy, pull = _stream(hidden, kernel, targets, temperature, softcap, with_pull=True)
    return (logprobs, entropy), pull


def _in_pieces_backward(
    temperature: float,
    softcap: float,
    pull: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None]:
    along_logprobs, _ = cotangents
    return (along_logprobs[..., None] * pull).astype(pull.dtype), None, None


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)


def _stream(hidden, kernel, targets, temperature, softcap, *, with_pull):
    """``softmax_stream`` of each piece; the gradients in ``hidden``'s dtype."""

    def piece(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        inside, chosen = inputs
        logprobs, entropy, pull = softmax_stream(
            inside.reshape(-1, inside.shape[-1]),
            kernel,
            chosen.reshape(-1),
            temperature,
            softcap,
            with_pull=with_pull,
        )
        values = logprobs.reshape(chosen.shape), entropy.reshape(chosen.shape)
        if pull is None:
            return values
        pull = pull.astype(inside.dtype).reshape(inside.shape)
        return *values, sharding.constrain(pull, "batch", None, "hidden")

    return jax.lax.map(piece, (hidden, targets))
