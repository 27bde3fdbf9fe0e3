"""From judged groups or worked examples to arrays of few different shapes.

Every batch of a run has the same number of rows, and lengths come from a short ladder, so one
compiled program serves all steps whose longest sequences fall on the same rungs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from cosr_jax.buckets import bucket_length
from cosr_jax.train.advantages import group_advantages
from cosr_jax.types import RolloutGroup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows of one optimizer step; a row without completion is padding.

    Rows of whole groups share their prompt: there are ``rows / group`` prompts, and row i continues
    prompt i // group.  Elsewhere every row has its own.
    """

    prompt_tokens: jax.Array  # int32 [prompts, prompt], padded on the left
    prompt_mask: jax.Array  # bool [prompts, prompt]
    completion_tokens: (
        jax.Array
    )  # int32 [rows, completion], padded on the right, stop token included
    completion_mask: jax.Array  # bool [rows, completion]
    advantages: jax.Array  # float32 [rows]; zero for SFT
    sampler_logprobs: jax.Array  # float32 [rows, completion]; zero for SFT
    num_microbatches: jax.Array  # int32 scalar: microbatches that hold a real row
    old_logprobs: jax.Array | None = (
        None  # float32 [rows, completion]; None: the policy is the old one
    )
    kl_scale: jax.Array | None = None  # float32 scalar: factor of ``grpo.kl_coef``; None: 1

    @property
    def rows(self) -> int:
        """Number of rows, padding included."""
        return self.completion_tokens.shape[0]

    @property
    def group(self) -> int:
        """Rows that continue one prompt."""
        return self.rows // self.prompt_tokens.shape[0]


@dataclasses.dataclass(frozen=True)
class GroupCounts:
    """What became of the groups that a GRPO batch was built from."""

    groups: int
    zero_variance_groups: int  # dropped: their usable rewards are all equal, or fewer than two
    unjudged_samples: int  # not ``Verdict.is_trainable``, in kept groups: left out
    rows: int  # samples in the batch


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The fixed number of rows of a run's batches, and the limits that its lengths obey.

    ``max_prompt`` and ``max_completion`` are in tokens; a length on a rung above its limit is cut
    down to the limit.
    """

    rows: int
    microbatch_rows: int
    max_prompt: int
    max_completion: int
    shards: int = 1  # pieces that a mesh cuts a microbatch's rows into

    def group(self, size: int) -> int:
        """Rows that share a prompt when groups have ``size`` samples: all of them, or just one.

        A prompt is shared where every shard of every microbatch holds whole groups.
        """
        is_whole = self.microbatch_rows % (size * self.shards) == 0
        return size if is_whole else 1


def microbatch_rows(rows: int, microbatch_size: int, shards: int = 1) -> int:
    """Rows of a microbatch: at most ``microbatch_size``, rounded up to the mesh's batch shards."""
    return -(-min(rows, microbatch_size) // shards) * shards


def batch_shape(
    samples: int, microbatch_size: int, max_prompt: int, max_completion: int, shards: int = 1
) -> BatchShape:
    """The shape that holds ``samples`` rows in whole microbatches, each whole on every shard."""
    size = microbatch_rows(samples, microbatch_size, shards)
    return BatchShape(-(-samples // size) * size, size, max_prompt, max_completion, shards)


@dataclasses.dataclass(frozen=True)
class _Row:
    prompt: Sequence[int]
    completion: Sequence[int]
    logprobs: Sequence[float] | None = None
    advantage: float = 0.0


def grpo_batch(
    groups: Sequence[RolloutGroup], shape: BatchShape, *, scale_advantages: bool
) -> tuple[TrainBatch | None, GroupCounts]:
    """A batch of the informative groups' judged samples.

    Samples without a verdict to train on (an ERROR, or an opinion that config leaves out) count
    neither in their group's mean and deviation nor in the batch: that is no wrong answer.  Where
    groups share their prompts, such a sample leaves an empty row.

    Returns:
      The batch, None if no group is informative, and the counts.

    Raises:
      ValueError: a group without verdicts, more samples than rows, or a sequence over the limits.
    """
    sizes = {len(group.completions) for group in groups}
    shared = shape.group(sizes.pop()) if len(sizes) == 1 else 1
    rows: list[_Row] = []
    dropped = unjudged = 0
    for group in groups:
        if len(group.verdicts) != len(group.completions):
            raise ValueError(f"group of task {group.task.task_id} has not been judged")
        judged = np.array([v.is_trainable for v in group.verdicts], bool)
        rewards = np.array([v.reward for v in group.verdicts], np.float32)
        advantages, informative = group_advantages(rewards, judged, scale=scale_advantages)
        if not informative:
            dropped += 1
            continue
        unjudged += int((~judged).sum())
        rows += [
            _Row(group.prompt_ids, completion.token_ids, completion.logprobs, float(advantage))
            if keep
            else _Row(group.prompt_ids, ())
            for completion, keep, advantage in zip(
                group.completions, judged, advantages, strict=True
            )
            if keep or shared > 1
        ]
    samples = sum(bool(row.completion) for row in rows)
    counts = GroupCounts(len(groups), dropped, unjudged, samples)
    return (_pack(rows, shape, shared) if rows else None), counts


def sft_batch(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], shape: BatchShape
) -> TrainBatch:
    """A batch of (prompt ids, completion ids) pairs; the loss is on the completions.

    Raises:
      ValueError: no example, more examples than rows, or a sequence over the limits.
    """
    return _pack([_Row(prompt, completion) for prompt, completion in examples], shape)


def _pack(rows: Sequence[_Row], shape: BatchShape, group: int = 1) -> TrainBatch:
    """Every ``group`` rows in turn have one prompt; alone, a row also needs a completion."""
    if not 0 < len(rows) <= shape.rows:
        raise ValueError(f"{len(rows)} sequences for a batch of {shape.rows} rows")
    if not all(row.prompt and (row.completion or group > 1) for row in rows):
        raise ValueError("every row needs a prompt and a completion of at least one token")
    prompt = bucket_length(max(len(row.prompt) for row in rows), shape.max_prompt)
    completion = bucket_length(max(len(row.completion) for row in rows), shape.max_completion)
    arrays = {
        "prompt_tokens": np.zeros((shape.rows // group, prompt), np.int32),
        "prompt_mask": np.zeros((shape.rows // group, prompt), bool),
        "completion_tokens": np.zeros((shape.rows, completion), np.int32),
        "completion_mask": np.zeros((shape.rows, completion), bool),
        "advantages": np.zeros(shape.rows, np.float32),
        "sampler_logprobs": np.zeros((shape.rows, completion), np.float32),
        "num_microbatches": np.asarray(-(-len(rows) // shape.microbatch_rows), np.int32),
    }
    for i, row in enumerate(rows):
        arrays["prompt_tokens"][i // group, prompt - len(row.prompt) :] = row.prompt
        arrays["prompt_mask"][i // group, prompt - len(row.prompt) :] = True
        arrays["completion_tokens"][i, : len(row.completion)] = row.completion
        arrays["completion_mask"][i, : len(row.completion)] = True
        arrays["advantages"][i] = row.advantage
        if row.logprobs is not None:
            arrays["sampler_logprobs"][i, : len(row.completion)] = row.logprobs
    return TrainBatch(**jax.tree.map(jax.numpy.asarray, arrays))
