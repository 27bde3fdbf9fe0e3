"""The objectives, as pure functions of log-probabilities; divided by their weight only once.

An objective returns a summed loss and its weight.  Microbatches add up both, so that any cut of a
batch gives the same update.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cosr_jax.config import GrpoConfig
from cosr_jax.student.routing import RouterLoad
from cosr_jax.train.batching import TrainBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """What one microbatch adds to a step."""

    loss: jax.Array  # float32 scalar, summed
    weight: jax.Array  # float32 scalar: tokens or sequences, as the objective's mean counts
    tokens: jax.Array  # float32 scalar: completion tokens, the weight of ``sums``
    sums: dict[str, jax.Array]  # metrics summed over tokens
    maxima: dict[str, jax.Array]  # non-negative metrics, to be maximised over tokens
    load: RouterLoad | None = None  # of the routers, by layer; None where there are no experts


@dataclasses.dataclass(frozen=True)
class SftObjective:
    """Negative log-likelihood of the completion tokens, averaged over tokens."""

    temperature: float = 1.0
    needs_reference: bool = False

    def divisor(self, weight: jax.Array) -> jax.Array:
        """What the summed loss is divided by, given the summed weight."""
        return weight

    def __call__(
        self,
        logprobs: jax.Array,
        entropy: jax.Array,
        reference: jax.Array | None,
        batch: TrainBatch,
    ) -> LossTerms:
        """Terms of ``batch``; ``logprobs`` and ``entropy`` are float32 [rows, completion]."""
        mask = batch.completion_mask
        tokens = mask.sum().astype(jnp.float32)
        loss = -jnp.where(mask, logprobs, 0.0).sum()
        return LossTerms(loss, tokens, tokens, {"entropy": _masked_sum(entropy, mask)}, {})


@dataclasses.dataclass(frozen=True)
class GrpoObjective:
    """GRPO (arXiv:2402.03300, equation 3) with the options of ``GrpoConfig``.

    Attributes:
      config: clip range, aggregation, KL and importance settings.
      temperature: that the samples were drawn at; the policy is softmax(logits / temperature).
      constant: Dr.GRPO's divisor (arXiv:2503.20783): samples of a step x longest completion,
        whatever was sampled.  Other aggregations do not read it.
    """

    config: GrpoConfig
    temperature: float
    constant: float

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy's log-probabilities are needed."""
        return self.config.kl_coef > 0

    def divisor(self, weight: jax.Array) -> jax.Array:
        """What the summed loss is divided by, given the summed weight."""
        return jnp.float32(self.constant) if self.config.aggregation == "dr_grpo" else weight

    def __call__(
        self,
        logprobs: jax.Array,
        entropy: jax.Array,
        reference: jax.Array | None,
        batch: TrainBatch,
    ) -> LossTerms:
        """Terms of ``batch``; the arrays are float32 [rows, completion]."""
        config, mask = self.config, batch.completion_mask
        old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
        # Padding is zeroed before exp, so that nothing there can overflow into a gradient.
        ratio = jnp.exp(jnp.where(mask, logprobs - old, 0.0))
        advantages = batch.advantages[:, None]
        per_token = policy_loss(ratio, advantages, config.clip_low, config.clip_high)
        gap = jnp.where(mask, jax.lax.stop_gradient(old) - batch.sampler_logprobs, 0.0)
        importance = importance_weight(gap, config.importance_cap)
        per_token = per_token * importance
        sums = {"entropy": _masked_sum(entropy, mask)}
        if reference is not None:
            kl = kl_estimate(jnp.where(mask, logprobs - reference, 0.0), config.kl_estimator)
            scale = 1.0 if batch.kl_scale is None else batch.kl_scale
            per_token = per_token + config.kl_coef * scale * kl
            sums["kl"] = _masked_sum(kl, mask)
        low = (ratio < 1 - config.clip_low) & (advantages < 0)
        high = (ratio > 1 + config.clip_high) & (advantages > 0)
        low, high = _masked_sum(low, mask), _masked_sum(high, mask)
        sums |= {
            "ratio/mean": _masked_sum(ratio, mask),
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,  # no token is both
            "sampling/importance_sampling_ratio/mean": _masked_sum(importance, mask),
            "sampling/sampling_logp_difference/mean": _masked_sum(jnp.abs(gap), mask),
        }
        maxima = {
            "ratio/max": jnp.where(mask, ratio, 0.0).max(),
            "sampling/sampling_logp_difference/max": jnp.abs(gap).max(),
        }
        loss, weight = aggregate(per_token, mask, config.aggregation)
        tokens = mask.sum().astype(jnp.float32)
        return LossTerms(loss, weight, tokens, sums, maxima)


def policy_loss(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> jax.Array:
    """PPO's clipped surrogate, negated, with DAPO's two-sided range (arXiv:2503.14476, eq. 8).

    Args:
      ratio: policy / old policy probability, [rows, time].
      advantages: [rows, 1] or [rows, time].
      clip_low: the ratio is clipped under 1 - clip_low.
      clip_high: the ratio is clipped over 1 + clip_high.

    Returns:
      [rows, time].  Where the clipped branch is the smaller the gradient is zero.
    """
    surrogate = ratio * advantages
    clipped = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high)) * advantages
    return -jnp.where(surrogate <= clipped, surrogate, clipped)


def importance_weight(gap: jax.Array, cap: float) -> jax.Array:
    """min(exp(gap), cap), without gradient: truncated importance sampling of the sampler's policy.

    Corrects for sampler and trainer disagreeing about the same weights (kernels, precision); the
    truncation bounds the variance (fengyao.notion.site/off-policy-rl; Ionides 2008).

    Args:
      gap: trainer's minus sampler's log-probability.
      cap: upper bound; 0 switches the correction off (all ones).
    """
    if not cap:
        return jnp.ones_like(gap)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap), cap))


def kl_estimate(log_ratio: jax.Array, estimator: str) -> jax.Array:
    """Per-token estimate of KL(policy || reference) (joschu.net/blog/kl-approx.html).

    The estimate is differentiated as it stands, as a loss term.  For samples of the current
    policy, k2's gradient is then an unbiased estimate of the KL's; k3's is that of the forward
    KL(reference || policy), the same to first order near the reference; k1's has mean zero, so k1
    measures but does not restrain.

    Args:
      log_ratio: log policy - log reference at the sampled tokens.
      estimator: "k1", log_ratio (unbiased); "k2", log_ratio^2 / 2 (biased, low variance); or
        "k3", exp(-log_ratio) - 1 + log_ratio (unbiased, never negative).

    Raises:
      ValueError: another estimator.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return jnp.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}")


def aggregate(
    per_token: jax.Array, mask: jax.Array, aggregation: str
) -> tuple[jax.Array, jax.Array]:
    """A summed loss and its weight.

    Args:
      per_token: float32 [rows, time].
      mask: bool [rows, time]; rows without tokens do not count.
      aggregation: "token_mean", sum and number of tokens (DAPO, arXiv:2503.14476);
        "sequence_mean", sum of the rows' means and number of rows (GRPO, arXiv:2402.03300);
        "dr_grpo", as token_mean: its constant divisor takes the place of the weight.

    Raises:
      ValueError: another aggregation.
    """
    per_token = jnp.where(mask, per_token, 0.0)
    lengths = mask.sum(axis=1)
    if aggregation in ("token_mean", "dr_grpo"):
        return per_token.sum(), lengths.sum().astype(jnp.float32)
    if aggregation == "sequence_mean":
        means = per_token.sum(axis=1) / jnp.maximum(lengths, 1)
        return means.sum(), (lengths > 0).sum().astype(jnp.float32)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, 0).astype(jnp.float32).sum()
