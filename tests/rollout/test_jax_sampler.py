import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import FakeVerifier
from rollout_fixtures import (
    NumberChat,
    log_softmax,
    make_engine,
    make_prompts,
    plain_logits,
    tiny_student,
)

from cosr_jax.config import MeshConfig, TrainConfig
from cosr_jax.rollout import prompts as prompts_module
from cosr_jax.rollout import slots
from cosr_jax.run.practice import sample_groups
from cosr_jax.sharding import make_mesh
from cosr_jax.train.batching import batch_shape, grpo_batch
from cosr_jax.train.step import make_logprobs_fn
from cosr_jax.types import Outcome, RolloutGroup, SamplingParams, Task, UserError, Verdict

SAMPLED = SamplingParams(max_new_tokens=12)
LENGTHS = (3, 17, 1, 30, 16)


@pytest.fixture(scope="module")
def student():
    return tiny_student()


@pytest.fixture(scope="module")
def engine(student):
    return make_engine(student, max_prompt_tokens=48)


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(LENGTHS)


@pytest.fixture(scope="module")
def groups(engine, prompts):
    return engine.generate(prompts, 4, SAMPLED, seed=5)


@pytest.fixture(scope="module")
def pairs(student):
    """An engine that decodes two prompts of four samples at once."""
    return make_engine(student, max_prompt_tokens=48, max_rows=8)


def assert_same(actual, expected, tolerance=2e-5):
    """Equal tokens and endings; log-probabilities up to the rounding of other array shapes."""
    assert len(actual) == len(expected)
    for some, other in zip(actual, expected, strict=True):
        for a, b in zip(some, other, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=tolerance)


def test_every_prompt_gets_its_samples_each_ended_for_a_reason(groups):
    chat = NumberChat(304)
    assert [len(group) for group in groups] == [4] * len(LENGTHS)
    completions = [c for group in groups for c in group]
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids) <= SAMPLED.max_new_tokens
        assert max(c.logprobs) <= 0
        assert not set(c.token_ids[:-1]) & set(chat.stop_ids)
        assert c.text == chat.decode(c.token_ids)
        if c.finish_reason == "stop":
            assert c.token_ids[-1] in chat.stop_ids
        else:
            assert len(c.token_ids) == SAMPLED.max_new_tokens
            assert c.token_ids[-1] not in chat.stop_ids
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert len({len(c.token_ids) for c in completions}) > 3
    assert all(len({c.token_ids for c in group}) > 1 for group in groups)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(engine, student, prompts, temperature):
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature)
    sampled = engine.generate(prompts, 4, sampling, seed=2)
    task = Task("math", "addition", 0.0, "1+1?", "2", "addition:1")
    verdicts = [Verdict(Outcome.PASS, 1.0), Verdict(Outcome.FAIL, 0.0, "wrong_answer")] * 2
    groups = [
        RolloutGroup(task, prompt, completions).judged(verdicts)
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]
    train = TrainConfig(microbatch_size=10, logit_chunk=32)
    batch, _ = grpo_batch(groups, batch_shape(20, 10, 48, 12), scale_advantages=True)
    trainers, _ = make_logprobs_fn(student, train, temperature)(student.lora, student.base, batch)
    mask = np.asarray(batch.completion_mask)
    assert mask.sum() == sum(len(c.token_ids) for group in sampled for c in group)
    assert not mask.all()  # some completions stop early
    gap = np.abs(np.asarray(trainers) - np.asarray(batch.sampler_logprobs))[mask]
    assert gap.max() <= 1e-4


def test_greedy_is_the_argmax_of_a_full_forward_at_every_step(engine, student, prompts):
    stops = NumberChat(304).stop_ids
    answers = engine.generate(prompts, 1, SamplingParams(12, temperature=0.0), seed=0)
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        tokens, logprobs = list(prompt), []
        for _ in range(12):
            last = log_softmax(plain_logits(student, tokens))[-1]
            tokens.append(int(last.argmax()))
            logprobs.append(last.max())
            if tokens[-1] in stops:
                break
        assert completion.token_ids == tuple(tokens[len(prompt) :])
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)


def test_rows_do_not_depend_on_how_the_call_is_cut(pairs, groups, prompts):
    """Cut into pairs, the prompts also stand beside others, and the last one has less padding."""
    assert_same(pairs.generate(prompts, 4, SAMPLED, seed=5), groups)


def test_rows_do_not_depend_on_other_prompts_or_padding(pairs, groups, prompts):
    others = [prompts[0], *make_prompts((31,))]
    assert_same(pairs.generate(others, 4, SAMPLED, seed=5)[:1], groups[:1])
    assert_same(pairs.generate(prompts[:1], 4, SAMPLED, seed=5), groups[:1])


def test_the_seed_decides(engine, groups, prompts):
    assert engine.generate(prompts, 4, SAMPLED, seed=5) == groups
    other = engine.generate(prompts, 4, SAMPLED, seed=6)
    assert [c.token_ids for g in other for c in g] != [c.token_ids for g in groups for c in g]


def test_equal_prompts_get_different_samples(pairs, prompts):
    first, second = pairs.generate([prompts[1]] * 2, 4, SAMPLED, seed=1)
    assert {c.token_ids for c in first} != {c.token_ids for c in second}


def test_a_limit_of_one_token(pairs, prompts):
    groups = pairs.generate(prompts[:2], 4, SamplingParams(max_new_tokens=1), seed=3)
    stops = NumberChat(304).stop_ids
    for completion in (c for group in groups for c in group):
        (token,) = completion.token_ids
        assert completion.finish_reason == ("stop" if token in stops else "length")


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 1), (1.0, 5), (0.6, 0)])
def test_truncated_samples_come_from_the_truncated_distribution(
    engine, student, prompts, top_p, top_k
):
    sampling = SamplingParams(6, temperature=0.7, top_p=top_p, top_k=top_k)
    for prompt, group in zip(prompts, engine.generate(prompts, 4, sampling, seed=9), strict=True):
        for c in group:
            logits = plain_logits(student, (*prompt, *c.token_ids))[len(prompt) - 1 : -1]
            for token, logprob, row in zip(
                c.token_ids, c.logprobs, log_softmax(logits / 0.7), strict=True
            ):
                ranked = np.sort(np.exp(row))[::-1]
                size = top_k or 1 + int((np.cumsum(ranked) < top_p).sum())
                assert np.exp(row[token]) >= ranked[size - 1]
                expected = row[token] - np.log(ranked[:size].sum())
                np.testing.assert_allclose(logprob, expected, atol=1e-4)


def test_samples_follow_the_joint_distribution_of_two_tokens():
    student = tiny_student(vocab=16)
    engine = make_engine(student, max_rows=4096)
    (prompt,) = make_prompts((5,), 16)
    (group,) = engine.generate([prompt], 4096, SamplingParams(2, temperature=1.5), seed=11)
    first = np.exp(log_softmax(plain_logits(student, prompt)[-1] / 1.5))
    stops = NumberChat(16).stop_ids
    expected = {}
    for a in range(16):
        second = np.exp(log_softmax(plain_logits(student, (*prompt, a))[-1] / 1.5))
        if a in stops:
            expected[a,] = first[a]
        else:
            expected |= {(a, b): first[a] * second[b] for b in range(16)}
    assert sum(expected.values()) == pytest.approx(1.0)
    counts = dict.fromkeys(expected, 0)
    for completion in group:
        counts[completion.token_ids] += 1
    pairs = sorted((p * 4096, counts[tokens]) for tokens, p in expected.items())
    likely = [pair for pair in pairs if pair[0] >= 5]
    rare = [pair for pair in pairs if pair[0] < 5]
    likely.append((sum(e for e, _ in rare), sum(c for _, c in rare)))
    statistic = sum((count - mean) ** 2 / mean for mean, count in likely)
    freedom = len(likely) - 1
    assert freedom > 40
    # Mean plus 5 deviations of the chi-square distribution.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_prompts_that_do_not_fit_are_refused(engine, prompts):
    for length in (0, 49):
        with pytest.raises(UserError, match=f"max_prompt_tokens: 48 .* prompt of {length} tokens"):
            engine.generate([*prompts, (1,) * length], 2, SAMPLED, seed=0)
    assert engine.generate([], 2, SAMPLED, seed=0) == []


def test_a_prompt_of_the_limit_is_answered(student):
    engine = make_engine(student, max_prompt_tokens=20)
    (prompt,) = make_prompts((20,))
    ((completion,),) = engine.generate([prompt], 1, SamplingParams(1, temperature=0.0), seed=0)
    assert completion.token_ids == (int(plain_logits(student, prompt)[-1].argmax()),)


def test_adapters_are_used_as_set(student, engine, prompts):
    greedy = SamplingParams(12, temperature=0.0)
    before = engine.generate(prompts, 1, greedy, seed=0)
    off = jax.tree.map(jnp.zeros_like, student.lora)
    try:
        engine.set_adapters(off)
        without = engine.generate(prompts, 1, greedy, seed=0)
    finally:
        engine.set_adapters(student.lora)
    assert [g[0].token_ids for g in without] != [g[0].token_ids for g in before]
    for prompt, (completion,) in zip(prompts, without, strict=True):
        first = log_softmax(plain_logits(student, prompt, off))[-1]
        assert completion.token_ids[0] == first.argmax()
        assert completion.logprobs[0] == pytest.approx(first.max(), abs=1e-4)
    assert engine.generate(prompts, 1, greedy, seed=0) == before


@pytest.fixture
def traced(monkeypatch):
    """Shapes of the programs that would be compiled; all rows stop at their first token."""
    shapes = []

    def prefill(graphdef, lora, base, tokens, mask):
        shapes.append(("prefill", *tokens.shape))
        kv = jnp.zeros((2, tokens.shape[0], 4, 8, tokens.shape[1]))
        return slots.Prompts(kv, jnp.swapaxes(kv, 3, 4))

    def decode(graphdef, lora, base, state, *, drawing, turn, **static):
        places, width = state.cache.prompt_positions.shape
        shapes.append(("decode", state.token.shape[0], places, width))
        ended, never = state.running & ~state.running, jnp.zeros_like(state.running)
        one = jnp.ones_like(state.drawn)
        state = dataclasses.replace(state, running=never, stopped=~never, drawn=one)
        return state, slots.Report(ended, ~never, one, state.tokens, state.logprobs)

    monkeypatch.setattr(slots, "prefill", prefill)
    monkeypatch.setattr(slots, "decode", decode)
    return shapes


def test_programs_are_as_few_as_the_buckets(traced, student):
    engine = make_engine(student, max_prompt_tokens=40, max_rows=12)
    for seed, lengths in enumerate(((9, 10), (17, 1), (3, 8))):
        for temperature in (1.0, 0.7):
            sampling = SamplingParams(2, temperature=temperature)
            engine.generate(make_prompts(lengths), 4, sampling, seed)
    assert traced == [("prefill", 2, 16), ("decode", 8, 2, 16)]
    # Seven prompts do not fit at once: every slot has a place of its own.
    groups = engine.generate(make_prompts((17, 30, 32, 20, 25, 31, 26)), 4, SAMPLED, seed=0)
    assert [len(group) for group in groups] == [4] * 7
    assert traced[2:] == [("prefill", 7, 32), ("decode", 12, 12, 32)]
    engine.set_adapters(jax.tree.map(lambda x: 2 * x, student.lora))
    engine.generate(make_prompts((32, 17, 18, 19, 20, 21, 33)), 4, SAMPLED, seed=4)
    assert len(traced) == 4
    # The last rung is the limit, and a group larger than max_rows goes through its slots.
    (group, _) = engine.generate(make_prompts((34, 5)), 20, SAMPLED, seed=4)
    assert len(group) == 20
    assert traced[4:] == [("prefill", 2, 39), ("decode", 12, 12, 39)]


def test_no_more_rows_at_once_than_configured(traced, student):
    engine = make_engine(student, max_rows=51)
    for count in (17, 15, 40):
        engine.generate(make_prompts((3,) * count), 3, SAMPLED, seed=0)
    assert max(shape[1] for shape in traced if shape[0] == "decode") == 51


def test_long_prompts_are_prefilled_some_at_a_time(traced, student, monkeypatch):
    monkeypatch.setattr(prompts_module, "_PREFILL_TOKENS", 64)
    engine = make_engine(student, max_prompt_tokens=40)
    groups = engine.generate(make_prompts((33,) * 5), 2, SAMPLED, seed=0)
    assert [len(group) for group in groups] == [2] * 5
    assert ("prefill", 2, 32) in traced


def test_how_weights_lie_does_not_show(student, groups, prompts):
    engine = make_engine(student, max_prompt_tokens=48, max_rows=8, decoding_copy=False)
    # Adapters beside their weights round otherwise than merged ones, in every layer and step.
    assert_same(engine.generate(prompts, 4, SAMPLED, seed=5), groups, tolerance=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("int8", 0.03)])
def test_smaller_caches_change_little(student, prompts, dtype, tolerance):
    """The student is a sharp one: its log-probabilities move by many times a vector's rounding."""
    greedy = SamplingParams(12, temperature=0.0)
    engine = make_engine(student, max_prompt_tokens=48, cache_dtype=dtype, decoding_copy=False)
    gaps = []
    for prompt, (c,) in zip(prompts, engine.generate(prompts, 1, greedy, seed=0), strict=True):
        rows = log_softmax(plain_logits(student, (*prompt, *c.token_ids)))[len(prompt) - 1 : -1]
        exact = rows[np.arange(len(c.token_ids)), list(c.token_ids)]
        gaps += np.abs(exact - c.logprobs).tolist()
    assert 1e-5 < np.median(gaps) < tolerance, np.median(gaps)


def test_refilling_changes_no_bit(student, pairs, prompts):
    whole = make_engine(student, max_prompt_tokens=48, max_rows=8, refill=False)
    refilled = pairs.generate(prompts, 4, SAMPLED, seed=5)
    assert whole.generate(prompts, 4, SAMPLED, seed=5) == refilled


def test_completions_are_handed_over_as_they_end(pairs, groups, prompts, monkeypatch):
    events = []
    decode = pairs._decode

    def watched(*args, **kwargs):
        events.append(None)
        return decode(*args, **kwargs)

    monkeypatch.setattr(pairs, "_decode", watched)
    told = pairs.generate(prompts, 4, SAMPLED, seed=5, on_finished=events.append)
    assert_same(told, groups)
    finished = [event for event in events if event is not None]
    assert {(f.prompt, f.sample): f.completion for f in finished} == {
        (prompt, sample): told[prompt][sample] for prompt in range(5) for sample in range(4)
    }
    assert len(finished) == 20
    # Most are told of while others are decoded.
    last_decode = max(i for i, event in enumerate(events) if event is None)
    assert sum(event is not None for event in events[:last_decode]) >= 10


class WhileDecoding:
    """A sampler that goes on after the first whole group only once judging has begun."""

    def __init__(self, sampler, begun):
        self.sampler, self.begun = sampler, begun
        self.left = None  # when judging was seen to have begun, how many completions were to come

    def generate(self, prompts, num_generations, sampling, seed, on_finished):
        told = [0] * len(prompts)

        def telling(finished):
            answer = on_finished(finished)
            told[finished.prompt] += 1
            if num_generations in told and self.left is None:
                assert self.begun.wait(60)  # for ever, if it began after the end of decoding
                self.left = len(prompts) * num_generations - sum(told)
            return answer

        return self.sampler.generate(prompts, num_generations, sampling, seed, telling)


def test_groups_are_judged_while_others_are_decoded(pairs, prompts):
    begun = threading.Event()

    class Beginning(FakeVerifier):
        def judge(self, cases):
            begun.set()
            return [Verdict(Outcome.PASS, len(c.token_ids) / 100) for _, c in cases]

    tasks = [
        Task("math", "s", 0.0, " ".join(map(str, prompt)), "1", f"{n}")
        for n, prompt in enumerate(prompts)
    ]
    engine, chat = WhileDecoding(pairs, begun), NumberChat(304)
    groups = sample_groups(tasks, 4, SAMPLED, engine, chat, Beginning(), seed=5)
    assert engine.left >= 4
    serial = pairs.generate(prompts, 4, SAMPLED, seed=5)
    assert [group.completions for group in groups] == serial  # to the last bit
    assert [group.task for group in groups] == tasks
    for group in groups:
        lengths = [len(completion.token_ids) for completion in group.completions]
        assert [verdict.reward for verdict in group.verdicts] == [n / 100 for n in lengths]


def test_a_group_ends_on_request(pairs, groups, prompts):
    """One slot ends at a time, so the first completion of a prompt comes before most others."""
    told = []

    def stop_second(finished):
        told.append(finished)
        return finished.prompt == 1

    cut = pairs.generate(prompts, 4, SAMPLED, seed=5, on_finished=stop_second)
    assert_same([cut[i] for i in (0, 2, 3, 4)], [groups[i] for i in (0, 2, 3, 4)])
    reasons = [completion.finish_reason for completion in cut[1]]
    assert "cancelled" in reasons and set(reasons) - {"cancelled"}
    for short, whole in zip(cut[1], groups[1], strict=True):
        length = len(short.token_ids)
        assert short.token_ids == whole.token_ids[:length]
        assert len(short.logprobs) == length
        if short.finish_reason != "cancelled":
            assert short.finish_reason == whole.finish_reason


@pytest.mark.parametrize("shape", [(1, 4, 2), (8, 1, 1)])
def test_a_mesh_changes_nothing(groups, prompts, shape):
    mesh = make_mesh(MeshConfig(*shape))
    engine = make_engine(tiny_student(mesh=mesh), mesh, max_prompt_tokens=48)
    assert_same(engine.generate(prompts, 4, SAMPLED, seed=5), groups, tolerance=1e-4)
