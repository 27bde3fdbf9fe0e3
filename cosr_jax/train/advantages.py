"""Group-relative advantages: a sample's credit is its reward against its siblings' mean."""

from __future__ import annotations

import numpy as np

#: Keeps near-ties from being blown up to unit advantages (TRL's value).
STD_EPSILON = 1e-4


def group_advantages(
    rewards: np.ndarray, judged: np.ndarray, *, scale: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages of samples within their groups (GRPO, arXiv:2402.03300, section 4.1.2).

    ``A_i = (r_i - mean r) / (std r + 1e-4)`` over the judged samples of the group, with the sample
    deviation (n - 1); without ``scale`` the deviation is left out, as Dr.GRPO does against its
    bias towards very easy and very hard questions (arXiv:2503.20783).

    Args:
      rewards: float [..., samples]; values of samples that are not judged are never read.
      judged: bool [..., samples]; False where no verdict exists.
      scale: divide by the deviation.

    Returns:
      float32 advantages [..., samples], zero for samples that are not judged, and bool [...]:
      whether the group is informative, that is, has two different judged rewards.  Groups that
      are not have zero advantages throughout.

    Raises:
      ValueError: the shapes differ, or a judged reward is not finite.
    """
    if rewards.shape != judged.shape:
        raise ValueError(f"rewards {rewards.shape} and judged {judged.shape} differ in shape")
    if not np.isfinite(rewards[judged]).all():
        raise ValueError(f"judged rewards must be finite, got {rewards[judged]}")
    values = np.where(judged, rewards, 0.0).astype(np.float64)
    count = judged.sum(-1, keepdims=True)
    mean = values.sum(-1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(judged, values - mean, 0.0)
    lowest = np.where(judged, rewards, np.inf).min(-1)
    highest = np.where(judged, rewards, -np.inf).max(-1)
    informative = highest > lowest
    if scale:
        deviation = np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1))
        centred = centred / (deviation + STD_EPSILON)
    return np.where(informative[..., None], centred, 0.0).astype(np.float32), informative
