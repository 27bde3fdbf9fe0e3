"""How evenly a router spreads tokens over its experts: counts of fixed size, whatever the batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """Sums over the tokens of a pass, float32; stacked over layers, and added up over passes."""

    chosen: jax.Array  # [..., experts]; (token, expert) pairs
    probability: jax.Array  # [..., experts]; of the router's softmax over all experts
    squares: jax.Array  # [...]; squared logsumexp of the router's logits
    tokens: jax.Array  # [...]; how many


def router_load(logits: jax.Array, experts: jax.Array, counts: jax.Array) -> RouterLoad:
    """The load of one layer; it carries no gradient.

    Args:
      logits: the router's, float32 [tokens, experts].
      experts: int32 [tokens, experts per token]; chosen.
      counts: [tokens]; how often each counts, 0 for padding.
    """
    logits, number = jax.lax.stop_gradient(logits), logits.shape[-1]
    counts = counts.astype(jnp.float32)
    chosen = jnp.zeros(number).at[experts].add(counts[:, None])
    # Products in full: accelerators would round what they multiply.
    probability = (counts[:, None] * jax.nn.softmax(logits, axis=-1)).sum(0)
    squares = (counts * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()
    return RouterLoad(chosen, probability, squares, counts.sum())


def no_load(experts: int) -> RouterLoad:
    """That of a layer without experts, where others have them."""
    nothing = jnp.zeros(experts, jnp.float32)
    return RouterLoad(nothing, nothing, jnp.float32(0), jnp.float32(0))


def load_metrics(load: RouterLoad) -> dict[str, jax.Array]:
    """What a step says about its routers, float32 scalars.

    Args:
      load: of one or more layers, [layers, ...]; those without tokens are left out.

    Returns:
      - "router/max_load": tokens of the busiest expert over the mean of all, mean of the layers;
        1 where they are even, the number of experts over those of a token at most.
      - "router/max_load_max": the same of the layer where it is largest.
      - "router/load_entropy": entropy of the experts' shares over its largest value, mean of the
        layers; 1 where they are even.
      - "router/idle": share of experts without a token, mean of the layers.
      - "router/aux_loss": experts x sum of share x mean probability, mean of the layers; 1 where
        they are even (arXiv:2101.03961, equation 4, with the shares of all chosen experts).
      - "router/z_loss": mean squared logsumexp of the logits (arXiv:2202.08906, equation 5).

      Neither loss is trained: routers are frozen.
    """
    experts = load.chosen.shape[-1]
    counts = load.tokens > 0
    layers = jnp.maximum(counts.sum(), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(counts, values, 0.0).sum() / layers

    tokens = jnp.maximum(load.tokens, 1)
    share = load.chosen / jnp.maximum(load.chosen.sum(-1, keepdims=True), 1)
    largest = experts * share.max(-1)
    entropy = -jnp.where(share > 0, share * jnp.log(share), 0.0).sum(-1)
    return {
        "router/max_load": mean(largest),
        "router/max_load_max": jnp.where(counts, largest, 0.0).max(),
        "router/load_entropy": mean(entropy / jnp.log(experts)),
        "router/idle": mean((load.chosen == 0).mean(-1)),
        "router/aux_loss": mean(experts * (share * load.probability).sum(-1) / tokens),
        "router/z_loss": mean(load.squares / tokens),
    }
