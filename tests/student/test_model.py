"""The decoder: against transformers' figures, NumPy oracles, and itself in other layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from student_fixtures import LORA, TINY_NAMES, reference, run, stirred, tiny_config, tiny_student

from cosr_jax.config import StudentConfig
from cosr_jax.student.model import (
    KVCache,
    ModelConfig,
    RMSNorm,
    abstract_student,
    merge,
    rotate,
)
from cosr_jax.types import UserError

TOLERANCE = 2e-4


@pytest.fixture
def student():
    return tiny_student()


@pytest.fixture
def prompts():
    return reference("tiny_llama")["prompts"]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_logits_and_greedy_continuations_equal_transformers(name):
    values, student = reference(name), tiny_student(name)
    prompts, continuations = values["prompts"], values["continuations"]
    # Each continuation token must be the likeliest after all before it: greedy decoding, at once.
    logits = run(student, np.concatenate([prompts, continuations[:, :-1]], axis=1))
    time = prompts.shape[1]
    assert np.abs(values["logits"]).max() > 1  # or the tolerance would mean nothing
    np.testing.assert_allclose(logits[:, :time], values["logits"], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(logits[:, time - 1 :].argmax(-1), continuations)


def test_left_and_right_padding_change_nothing(student, prompts):
    batch, time = prompts.shape
    plain = run(student, prompts)
    padding = np.full((batch, 5), 7)
    right = run(
        student,
        np.concatenate([prompts, padding], 1),
        segment_ids=np.broadcast_to(np.arange(time + 5) < time, (batch, time + 5)),
    )
    left = run(
        student,
        np.concatenate([padding, prompts], 1),
        positions=np.broadcast_to(np.maximum(np.arange(time + 5) - 5, 0), (batch, time + 5)),
        segment_ids=np.broadcast_to(np.arange(time + 5) >= 5, (batch, time + 5)),
    )
    np.testing.assert_allclose(right[:, :time], plain, atol=1e-4)
    np.testing.assert_allclose(left[:, 5:], plain, atol=1e-4)
    assert np.isfinite(left).all() and np.isfinite(right).all()


def test_packed_segments_do_not_see_each_other(student, prompts):
    first, second = prompts[0, :7], prompts[1, :9]
    packed = run(
        student,
        np.concatenate([first, second, [0, 0]])[None],
        positions=np.concatenate([np.arange(7), np.arange(9), [0, 0]])[None],
        segment_ids=np.array([[1] * 7 + [2] * 9 + [0] * 2]),
    )
    np.testing.assert_allclose(packed[0, :7], run(student, first[None])[0], atol=1e-4)
    np.testing.assert_allclose(packed[0, 7:16], run(student, second[None])[0], atol=1e-4)


def test_later_tokens_change_nothing_earlier(student, prompts):
    changed = prompts.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % 96
    before, after = run(student, prompts), run(student, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert not np.array_equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("name", TINY_NAMES)
def test_decoding_token_by_token_equals_the_full_forward(name):
    """Two prompts of lengths 6 and 3, two different samples of each, adapters on."""
    student, columns, samples = tiny_student(name), 5, 2
    lora = stirred(student.lora)
    sequences = reference(name)["prompts"][:4, : 6 + columns].copy()
    sequences[1, :6], sequences[3, :6] = sequences[0, :6], sequences[2, :6]
    pads = np.array([0, 3])
    prompts = sequences[::samples, :6]  # the second prompt's first three tokens are padding
    mask = np.arange(6)[None] >= pads[:, None]
    positions = np.arange(6)[None] - pads[:, None]

    @jax.jit
    def prefill(lora, base):
        module = merge(student.graphdef, lora, base)
        return module.prefill(
            jnp.asarray(prompts), jnp.asarray(np.maximum(positions, 0)), jnp.asarray(mask)
        )

    @jax.jit
    def decode(lora, base, cache, tokens, positions, column):
        module = merge(student.graphdef, lora, base)
        hidden, cache = module.decode(tokens, positions, cache, column)
        return module.logits(hidden), cache

    row_pads = np.repeat(pads, samples)
    full = [
        run(student, sequences[row : row + 1, row_pads[row] :], lora=lora)[0] for row in range(4)
    ]
    k, v = prefill(lora, student.base)
    empty = KVCache.empty(student.config, 4, 2, 6, columns, jnp.float32, unstacked=False)
    seen = jnp.asarray(np.where(mask, positions, -1))
    cache = dataclasses.replace(empty, prompt_k=k, prompt_v=v, prompt_positions=seen)
    for step in range(columns):
        tokens = jnp.asarray(sequences[:, 6 + step])
        at, column = jnp.asarray(6 + step - row_pads), jnp.full(4, step)
        logits, cache = decode(lora, student.base, cache, tokens, at, column)
        for row, pad in enumerate(row_pads):
            np.testing.assert_allclose(logits[row], full[row][6 + step - pad], atol=1e-4)


def test_layers_kept_or_recomputed_give_the_same(student, prompts):
    keeping = _with(student, remat="none")
    np.testing.assert_allclose(run(keeping, prompts), run(student, prompts), atol=1e-5)


def test_bfloat16_compute_stays_close(student, prompts):
    logits, wide = run(_with(student, compute_dtype="bfloat16"), prompts), run(student, prompts)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - wide).max() < 0.1 * np.abs(wide).max()


def _with(student, **settings):
    """The same weights under other student settings."""
    abstract = abstract_student(student.config, StudentConfig(**settings), LORA)
    return dataclasses.replace(student, graphdef=abstract.graphdef)


def test_rms_norm_equals_its_formula():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(0, 3, (2, 5, 16)), rng.normal(1, 0.5, 16)
    norm = RMSNorm(None, 16, 1e-5, jnp.float32)
    norm.weight = nnx.Param(jnp.asarray(weight, jnp.float32))
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, atol=1e-5)


@given(position=st.integers(0, 4096), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rotation_is_multiplication_by_a_unit_complex_number(position, seed):
    """Coordinates i and i + d/2 are one complex number, turned by position * theta^(-2i/d)."""
    x = np.random.default_rng(seed).normal(size=(1, 1, 2, 8))
    angles = position * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    cos, sin = (jnp.asarray(f(angles), jnp.float32).reshape(1, 1, 1, 4) for f in (np.cos, np.sin))
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones():
    config = ModelConfig.from_hf(tiny_config("tiny_llama3"))
    plain = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    wanted = []
    for frequency in plain:  # the three cases of Meta's reference, written out
        wavelength = 2 * np.pi / frequency
        if wavelength < 32 / 4:
            wanted.append(frequency)
        elif wavelength > 32 / 1:
            wanted.append(frequency / 8)
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(config.inverse_frequencies(), wanted, rtol=1e-6)
    shares = np.array(wanted) / plain  # all three cases occur
    assert shares[0] == 1 and shares[-1] == 0.125 and ((shares > 0.125) & (shares < 1)).any()


def test_both_spellings_of_rope_in_config_json_read_the_same():
    old = tiny_config("tiny_llama3")
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("model_type", "gpt2")],
)
def test_unsupported_options_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key} {value!r}"):
        ModelConfig.from_hf({**tiny_config("tiny_llama"), key: value})
