"""Tunix's side of ``bench_train``: its Llama, with qwix's adapters, sampler and learner.

A sampler without adapters has the merged weights, since a fresh adapter adds nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
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
)
from flax import nnx
from safetensors.numpy import load_file
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

NO_TOKEN = -1  # as padding and end of sequence: nothing is padded, and nothing ends early


class Numbers:
    """A tokenizer for which a text is token ids, with blanks between them."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return _text(ids)

    def bos_id(self) -> int:
        return 0  # none is put first

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN


def _text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _load(job: Job, *, adapted: bool = True) -> llama.Llama3:
    """The student, with the same adapters as our side's."""
    values = json.loads((Path(job.student) / "config.json").read_text(encoding="utf-8"))
    heads = values["num_attention_heads"]
    rope = values.get("rope_parameters") or values
    config = llama.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=values["rms_norm_eps"],
        weight_tying=values["tie_word_embeddings"],
    )
    # Tunix 0.1.7 does not hand the config's base on, so that every Llama turns by the default's.
    plain = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    llama.apply_rope = plain
    model = create_model_from_safe_tensors(job.student, config, dtype=jnp.dtype(job.dtype))
    if not adapted:
        return model
    adapter = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    provider = qwix.LoraProvider(
        module_path=".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        rank=adapter["r"],
        alpha=adapter["lora_alpha"],
    )
    inputs = model.get_model_input()
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **inputs)
    _take_adapters(model, load_file(Path(job.adapter) / "adapter_model.safetensors"))
    return model


def _take_adapters(model: llama.Llama3, tensors: dict[str, np.ndarray]) -> None:
    """PEFT's [rank, in] and [out, rank] as qwix's [in..., rank] and [rank, out...], float32."""
    left = dict(tensors)
    for path, variable in nnx.state(model, nnx.LoRAParam).flat_state():
        _, layer, room, linear, kind = path
        room = {"attn": "self_attn"}.get(room, room)
        name = f"model.layers.{layer}.{room}.{linear}.lora_{kind[-1].upper()}.weight"
        value = left.pop(f"base_model.model.{name}")
        variable[...] = jnp.asarray(value.T.reshape(variable.shape), jnp.float32)
    if left:
        raise RuntimeError(f"no place for the adapters {sorted(left)[:3]} ...")


def _optimizer() -> optax.GradientTransformation:
    adam = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def _about() -> dict[str, Any]:
    names = ("google-tunix", "qwix", "jax", "flax", "optax")
    return {
        "threads": f"XLA's pool: {os.cpu_count()} CPUs",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def sft(job: Job, channel: Channel) -> None:
    """PeftTrainer's compiled step, called as its loop calls it."""
    model = _load(job)
    rows = np.array(sft_rows(model.config.vocab_size, job.sizes))
    trainer = PeftTrainer(model, _optimizer(), TrainingConfig(eval_every_n_steps=10**9))
    number, length = rows.shape

    def model_input(batch: TrainingInput) -> dict[str, Any]:
        causal = jnp.tril(jnp.ones((length, length), bool))
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(length), (number, length)),
            "attention_mask": jnp.broadcast_to(causal, (number, length, length)),
        }

    trainer.with_gen_model_input_fn(model_input)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    batch = TrainingInput(jnp.asarray(rows), jnp.ones(rows.shape, bool))

    def take_step() -> float:
        return float(jax.block_until_ready(train_step(batch))[0])

    first_s, loss = clock(take_step)
    check = [loss, take_step()]
    channel.ready("Tunix PeftTrainer", {"step": first_s}, check, **_about())
    while channel.go_on():
        channel.done(step=clock(take_step)[0])


def _greedy(sampler: Any, prompts: list[list[int]], number: int, width: int) -> list[float]:
    """Mean log-probability of ``number`` greedy tokens of each prompt."""
    out = sampler(
        [_text(ids) for ids in prompts], number, max_prompt_length=width, return_logprobs=True
    )
    return [float(np.mean(row)) for row in out.logprobs]


def rollout(job: Job, channel: Channel) -> None:
    """Its own sampler, one compiled loop."""
    model, sizes = _load(job, adapted=False), job.sizes
    config, width = model.config, sizes.rollout_prompt_tokens
    prompts = rollout_prompts(config.vocab_size, sizes)
    cache = CacheConfig(
        width + sizes.rollout_new_tokens, config.num_layers, config.num_kv_heads, config.head_dim
    )
    sampler = Sampler(model, Numbers(), cache)

    def sample(seed: int) -> None:
        out = sampler(
            [_text(ids) for ids in prompts],
            sizes.rollout_new_tokens,
            max_prompt_length=width,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        _expect_length(out.tokens, sizes.rollout_new_tokens)

    first_s, _ = clock(sample, 0)
    check = _greedy(sampler, prompts, sizes.greedy_tokens, width)
    channel.ready("Tunix Sampler", {"rollout": first_s}, check, **_about())
    seed = 1
    while channel.go_on():
        channel.done(rollout=clock(sample, seed)[0])
        seed += 1


def _expect_length(rows: list[Any], length: int) -> None:
    if found := {len(row) for row in rows} - {length}:
        raise RuntimeError(f"completions of {sorted(found)} tokens, expected {length}")


def grpo(job: Job, channel: Channel) -> None:
    """Its learner, one repetition a global step; the data's iterator holds it up between steps."""
    model, sizes = _load(job), job.sizes
    vocab, length = model.config.vocab_size, sizes.grpo_new_tokens
    prompts = grpo_prompts(vocab, sizes)
    micro = min(len(prompts), MICROBATCH // sizes.grpo_samples)  # prompts
    check = common.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=jnp.array(prompts),
        completion_tokens=jnp.array(scored_completions(vocab, sizes)),
        pad_id=NO_TOKEN,
        eos_id=NO_TOKEN,
        return_logits=False,
    ).mean(axis=1)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=_optimizer(),
                eval_every_n_steps=10**9,
                max_steps=10**6,
                mini_batch_size=len(prompts),
                train_micro_batch_size=micro,
                rollout_micro_batch_size=len(prompts),
                compute_logps_micro_batch_size=micro,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=length,
                max_prompt_length=sizes.grpo_prompt_tokens,
                kv_cache_size=sizes.grpo_prompt_tokens + length,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    rollout_s, generate = 0.0, cluster.generate

    def timed_generate(*args: Any, **settings: Any) -> Any:
        nonlocal rollout_s
        rollout_s, out = clock(functools.partial(generate, *args, **settings))
        _expect_length(out.tokens, length)
        return out

    def batches() -> Iterator[dict[str, np.ndarray]]:
        """The same prompts for each step; asked for the next, the last one has been taken."""
        texts = np.array([_text(ids) for ids in prompts])
        is_first, started = True, time.perf_counter()
        while True:
            yield {"prompts": texts}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.LoRAParam))
            step_s = time.perf_counter() - started
            seconds = {"rollout": rollout_s, "train": step_s - rollout_s, "step": step_s}
            if is_first:
                channel.ready("Tunix GRPOLearner", seconds, check.tolist(), **_about())
            else:
                channel.done(**seconds)
            is_first = False
            if not channel.go_on():
                return
            started = time.perf_counter()

    cluster.generate = timed_generate
    learner = GRPOLearner(
        cluster,
        GRPOConfig(num_generations=sizes.grpo_samples, beta=0.0),
        lambda prompts, completions, **_: [sample_reward(i) for i in range(len(completions))],
    )
    learner.train(batches())
