"""Students with and without experts, plain and packed: the same on one device and on eight."""

import jax
import numpy as np
import pytest
from rollout_fixtures import make_engine
from stepping_fixtures import PROMPTS, TRAIN, grpo_rows, one_step, sft_rows, student

from cosr_jax.config import GrpoConfig, MeshConfig
from cosr_jax.sharding import make_mesh
from cosr_jax.student.quantised import is_packed
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import make_logprobs_fn
from cosr_jax.types import SamplingParams

SAMPLED = SamplingParams(max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantise"),
    [
        ("dense", "int8"),
        ("dense", "nf4"),
        ("qwen3_moe", "none"),
        ("qwen3_moe", "int8"),
        ("gpt_oss", "none"),
        ("gpt_oss", "nf4"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_samples_and_steps_are_the_same_on_eight_devices(name, quantise):
    eight = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, spread = student(name, None, quantise), student(name, eight, quantise)
    assert is_packed(one.base) == is_packed(spread.base) == (quantise != "none")
    shared = make_engine(one).generate(PROMPTS, 2, SAMPLED, seed=5)
    results = {}
    for mesh, some in ((None, one), (eight, spread)):
        own = make_engine(some, mesh).generate(PROMPTS, 2, SAMPLED, seed=5)
        batch = grpo_rows(own, mesh)
        trainers, _ = make_logprobs_fn(some, TRAIN, 1.0, mesh)(some.lora, some.base, batch)
        mask = np.asarray(batch.completion_mask)
        gap = np.abs(np.asarray(trainers) - np.asarray(batch.sampler_logprobs))[mask]
        assert gap.max() <= 1e-4, mesh
        grpo = GrpoObjective(GrpoConfig(), 1.0, 64.0)
        results[mesh] = [
            one_step(some, grpo, grpo_rows(shared, mesh), mesh),
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
        if name != "dense":
            assert any("moe" in path and path[-1] == "lora_b" for path in lora)
            assert 1 < metrics["router/max_load"] <= metrics["router/max_load_max"] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["dense", "qwen3_moe", "gpt_oss"])
def test_a_packed_kernel_is_spread_and_greedy_answers_do_not_change(name, quantise):
    eight = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    one, spread = student(name, None, quantise), student(name, eight, quantise)
    module = spread.base["layers"]["mlp" if name == "dense" else "moe"]
    for linear in module:
        if linear == "router":
            continue
        kernel = module[linear]["kernel"].get_raw_value()
        for part in jax.tree.leaves(kernel):
            assert part.addressable_shards[0].data.nbytes * 8 == part.nbytes
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0)
    alone, together = (
        make_engine(some, mesh).generate(PROMPTS, 1, greedy, seed=0)
        for some, mesh in ((one, None), (spread, eight))
    )
    assert [c.token_ids for (c,) in alone] == [c.token_ids for (c,) in together]
