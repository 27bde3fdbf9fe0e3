"""Students with experts: sampled, trained and counted alike on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rollout_fixtures import make_engine, make_prompts, moved_adapters

from cosr_jax.config import GrpoConfig, LoraConfig, MeshConfig, StudentConfig, TrainConfig
from cosr_jax.sharding import make_mesh
from cosr_jax.student.families import MoeConfig
from cosr_jax.student.model import ModelConfig, Student, abstract_student, random_base
from cosr_jax.student.routing import load_metrics, router_load
from cosr_jax.train.batching import batch_shape, grpo_batch, sft_batch
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import batch_shards, init_state, make_logprobs_fn, make_train_step
from cosr_jax.types import Outcome, RolloutGroup, SamplingParams, Task, Verdict

PLAIN = ModelConfig(64, 32, 64, 2, 8, 4, 8, 1e-6, 10_000.0, True)
#: Like Qwen3-MoE, and like gpt-oss.
MODELS = {
    "qwen3_moe": dataclasses.replace(PLAIN, qk_norm=True, moe=MoeConfig(8, 3, 16, True)),
    "gpt_oss": dataclasses.replace(
        PLAIN,
        qkv_bias=True,
        output_bias=True,
        attention_sinks=True,
        sliding_window=8,
        sliding_layers=(0,),
        moe=MoeConfig(8, 2, 16, True, clamped=True),
    ),
}
TRAIN = TrainConfig(microbatch_size=4, logit_chunk=64)
SAMPLED = SamplingParams(max_new_tokens=8)
PROMPTS = make_prompts((3, 9, 5, 7), vocab=64)


def student(name, mesh=None):
    model = MODELS[name]
    abstract = abstract_student(model, StudentConfig(), LoraConfig(rank=2, alpha=4.0))
    base = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, random_base(abstract.base, 0, mesh))
    return Student(model, abstract.graphdef, moved_adapters(abstract, mesh), base)


def judged(completions):
    """Groups whose longer answers are right."""
    task = Task("math", "addition", 0.0, "1+1?", "2", "addition:1")
    groups = []
    for prompt, group in zip(PROMPTS, completions, strict=True):
        verdicts = [Verdict(Outcome.PASS, 1.0), Verdict(Outcome.FAIL, 0.0, "wrong_answer")]
        groups.append(RolloutGroup(task, prompt, group).judged(verdicts))
    return groups


def grpo_rows(completions, mesh):
    shape = batch_shape(8, TRAIN.microbatch_size, 16, 8, batch_shards(mesh))
    return grpo_batch(judged(completions), shape, scale_advantages=True)[0]


def sft_rows(mesh):
    rng = np.random.default_rng(3)
    examples = [(prompt, rng.integers(1, 64, 3 + i).tolist()) for i, prompt in enumerate(PROMPTS)]
    return sft_batch(examples, batch_shape(4, TRAIN.microbatch_size, 16, 8, batch_shards(mesh)))


def one_step(some, objective, batch, mesh):
    step = make_train_step(some, objective, TRAIN, mesh)
    state = init_state(jax.tree.map(jnp.copy, some.lora), TRAIN, mesh)
    state, metrics = step(state, some.base, batch, 1e-3)
    lora = {path: np.asarray(leaf[...]) for path, leaf in state.lora.flat_state()}
    return lora, {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_samples_and_steps_are_the_same_on_eight_devices(name):
    one, eight = student(name), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = student(name, eight)
    completions = make_engine(one).generate(PROMPTS, 2, SAMPLED, seed=5)
    results = {}
    for mesh, some in ((None, one), (eight, spread)):
        engine = make_engine(some, mesh)
        own = engine.generate(PROMPTS, 2, SAMPLED, seed=5)
        batch = grpo_rows(own, mesh)
        trainers, _ = make_logprobs_fn(some, TRAIN, 1.0, mesh)(some.lora, some.base, batch)
        mask = np.asarray(batch.completion_mask)
        gap = np.abs(np.asarray(trainers) - np.asarray(batch.sampler_logprobs))[mask]
        assert gap.max() <= 1e-4, mesh
        grpo = GrpoObjective(GrpoConfig(), 1.0, 64.0)
        results[mesh] = [
            one_step(some, grpo, grpo_rows(completions, mesh), mesh),
            one_step(some, SftObjective(), sft_rows(mesh), mesh),
        ]
    before = {path: np.asarray(leaf[...]) for path, leaf in one.lora.flat_state()}
    for (lora, metrics), (lora8, metrics8) in zip(results[None], results[eight], strict=True):
        assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0
        assert metrics8 == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        for path, value in lora.items():
            assert np.isfinite(value).all() and (value != before[path]).any(), path
            moved, moved8 = value - before[path], lora8[path] - before[path]
            np.testing.assert_allclose(moved8, moved, rtol=0, atol=2e-4, err_msg=str(path))
        assert any("moe" in path and path[-1] == "lora_b" for path in lora)
        assert 1 < metrics["router/max_load"] <= metrics["router/max_load_max"] <= 8


def oracle(logits, number):
    """The metrics of layers of float64 logits [tokens, experts], in plain NumPy."""
    found = {}
    for rows in logits:
        experts = rows.shape[1]
        counts = np.zeros(experts)
        for row in rows:
            counts[np.argsort(-row)[:number]] += 1
        share = counts / counts.sum()
        odds = np.exp(rows - rows.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        inside = share[share > 0]
        values = {
            "router/max_load": experts * share.max(),
            "router/load_entropy": -(inside * np.log(inside)).sum() / np.log(experts),
            "router/idle": (counts == 0).mean(),
            "router/aux_loss": experts * (share * odds.mean(0)).sum(),
            "router/z_loss": (np.log(np.exp(rows).sum(1)) ** 2).mean(),
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return {
        **{key: np.mean(values) for key, values in found.items()},
        "router/max_load_max": np.max(found["router/max_load"]),
    }


@pytest.mark.parametrize("number", [1, 3])
def test_load_is_counted_as_defined_and_without_padding(number):
    rng = np.random.default_rng(number)
    logits = rng.normal(0.0, 2.0, (2, 40, 8)) + 3.0 * (np.arange(8) == 2)
    real = rng.random(40) < 0.7
    experts = np.argsort(-logits, axis=-1)[..., :number]
    halves = [slice(0, 15), slice(15, 40)]
    loads = [
        jax.vmap(router_load, (0, 0, None))(
            jnp.asarray(logits[:, half], jnp.float32),
            jnp.asarray(experts[:, half]),
            jnp.asarray(real[half]),
        )
        for half in halves
    ]
    found = load_metrics(loads[0] + loads[1])
    expected = oracle(logits[:, real], number)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-5)


def test_an_even_load_is_one_and_layers_without_experts_do_not_count():
    logits = jnp.zeros((8, 4))
    experts = jnp.arange(16).reshape(8, 2) % 4
    even = router_load(logits, experts, jnp.ones(8, bool))
    both = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), even)
    found = {name: float(value) for name, value in load_metrics(both).items()}
    names = ("max_load", "max_load_max", "load_entropy", "aux_loss")
    assert [found[f"router/{name}"] for name in names] == pytest.approx([1.0] * 4)
    assert found["router/idle"] == 0.0
    assert found["router/z_loss"] == pytest.approx(np.log(4.0) ** 2)


def test_a_steps_load_is_that_of_all_its_tokens():
    """Where nothing but the token reaches the routers, their numbers are known beforehand."""
    some = student("qwen3_moe")
    silenced = {("layers", "attn", "o_proj"), ("layers", "moe", "down_proj")}

    def still(state):
        flat = state.flat_state()
        return nnx.State.from_flat_path(
            {p: v.replace(v[...] * (p[:-1] not in silenced)) for p, v in flat}
        )

    some = dataclasses.replace(some, base=still(some.base), lora=still(some.lora))
    batch = sft_rows(None)
    _, metrics = one_step(some, SftObjective(), batch, None)
    weights = {path: np.asarray(leaf[...], np.float64) for path, leaf in some.base.flat_state()}
    tokens = np.concatenate([batch.prompt_tokens, batch.completion_tokens], 1)
    mask = np.concatenate([batch.prompt_mask, batch.completion_mask], 1)
    x = weights["embed",][tokens[mask]]
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    x = x * weights["layers", "mlp_norm", "weight"][:, None]
    logits = x @ weights["layers", "moe", "router", "kernel"]
    expected = oracle(logits, 3)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
