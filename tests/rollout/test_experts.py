"""What routers do, in numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stepping_fixtures import one_step, sft_rows, student

from cosr_jax.student.routing import load_metrics, router_load
from cosr_jax.train.losses import SftObjective


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
    found = load_metrics(jax.tree.map(jnp.add, *loads))
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
