"""Packing: which rows are there, where their tokens lie, and how few shapes there are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_fixtures import group

from cosr_jax.train.batching import (
    batch_shape,
    grpo_batch,
    microbatch_rows,
    sft_batch,
)

SHAPE = batch_shape(12, 4, 16, 16)


def test_grpo_rows_are_the_judged_samples_of_informative_groups():
    groups = [
        group([1.0, 0.0, None, 0.0], seed=0),
        group([1.0, 1.0, 1.0, 1.0], seed=1),  # solved by all
        group([1.0, None, None, None], seed=2),  # nothing to compare with
        group([0.0, 1.0], seed=3),
    ]
    batch, counts = grpo_batch(groups, SHAPE, scale_advantages=False)
    assert (counts.groups, counts.zero_variance_groups) == (4, 2)
    assert (counts.unjudged_samples, counts.rows) == (1, 5)
    third = 1 / 3
    np.testing.assert_allclose(
        batch.advantages[:6], [1 - third, -third, -third, -0.5, 0.5, 0.0], rtol=1e-6
    )
    kept = [groups[0].completions[i] for i in (0, 1, 3)] + list(groups[3].completions)
    for row, completion in enumerate(kept):
        length = len(completion.token_ids)
        assert tuple(batch.completion_tokens[row, :length].tolist()) == completion.token_ids
        np.testing.assert_array_equal(
            batch.completion_mask[row], np.arange(batch.completion_mask.shape[1]) < length
        )
        np.testing.assert_allclose(
            batch.sampler_logprobs[row, :length], completion.logprobs, rtol=1e-6
        )
    assert not batch.completion_mask[5:].any()
    assert int(batch.num_microbatches) == 2


def test_a_verdict_that_is_left_out_counts_like_none():
    lowered = group([1.0, 0.0, 0.8, 0.0])
    opinion = dataclasses.replace(lowered.verdicts[2], is_left_out=True)
    left_out = lowered.judged([*lowered.verdicts[:2], opinion, lowered.verdicts[3]])
    unjudged = group([1.0, 0.0, None, 0.0])
    batches = [grpo_batch([g], SHAPE, scale_advantages=False) for g in (left_out, unjudged)]
    assert batches[0][1] == batches[1][1]
    np.testing.assert_array_equal(batches[0][0].advantages, batches[1][0].advantages)
    alone = group([0.8, 0.0])
    assert alone.is_informative
    opinion = dataclasses.replace(alone.verdicts[0], is_left_out=True)
    assert not alone.judged([opinion, alone.verdicts[1]]).is_informative


def test_scaled_advantages_reach_the_batch():
    groups = [group([1.0, 0.0, 0.0, 0.0])]
    plain, _ = grpo_batch(groups, SHAPE, scale_advantages=False)
    scaled, _ = grpo_batch(groups, SHAPE, scale_advantages=True)
    np.testing.assert_allclose(scaled.advantages, plain.advantages / (0.5 + 1e-4), rtol=1e-6)


def test_without_an_informative_group_there_is_no_batch():
    batch, counts = grpo_batch([group([0.0, 0.0])], SHAPE, scale_advantages=True)
    assert batch is None
    assert (counts.zero_variance_groups, counts.rows) == (1, 0)


def test_prompts_end_where_completions_begin():
    batch = sft_batch([([5, 6, 7], [8, 9]), ([4], [3])], SHAPE)
    assert batch.prompt_tokens[0, -3:].tolist() == [5, 6, 7]
    assert batch.prompt_mask[1].tolist() == [False] * 15 + [True]
    assert batch.completion_tokens[0, :3].tolist() == [8, 9, 0]


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "0 sequences"),
        ([([1], [2])] * 13, "13 sequences"),
        ([([1], [])], "at least one token"),
        ([(list(range(17)), [2])], "17 tokens is over the limit of 16"),
    ],
)
def test_what_does_not_fit_is_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        sft_batch(examples, SHAPE)


def test_groups_must_be_judged():
    unjudged = group([1.0, 0.0]).judged
    with pytest.raises(ValueError, match="verdicts"):
        unjudged([])
    with pytest.raises(ValueError, match="not been judged"):
        bare = group([1.0, 0.0])
        grpo_batch(
            [type(bare)(bare.task, bare.prompt_ids, bare.completions)],
            SHAPE,
            scale_advantages=True,
        )


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([1, 2, 8, 16]))
def test_rows_are_whole_microbatches_on_every_shard(samples, microbatch_size, shards):
    shape = batch_shape(samples, microbatch_size, 16, 16, shards)
    assert shape.rows >= samples
    assert shape.rows % shape.microbatch_rows == 0
    assert shape.microbatch_rows % shards == 0
    # The step recovers the microbatch from the number of rows alone.
    assert microbatch_rows(shape.rows, microbatch_size, shards) == shape.microbatch_rows
