"""What runs on the device during a rollout: prompts to caches, rows into slots, tokens drawn.

A slot decodes one row, a sample of a prompt.  All slots take a step together; a row that has ended
leaves its slot to another, so slots are at different tokens of their rows.  Shapes never change.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax import sharding
from cosr_jax.rollout.sampling import draw_token
from cosr_jax.student.cache import KEY_AXIS, VALUE_AXIS
from cosr_jax.student.model import KVCache, merge
from cosr_jax.student.packed import Packed, pack
from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.unstacked import Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prefilled prompts that wait for slots: all their tokens but the last."""

    k: jax.Array  # [layers, prompts, kv_heads, head_dim, columns]
    v: jax.Array  # [layers, prompts, kv_heads, columns, head_dim]
    positions: jax.Array  # int32 [prompts, columns]; -1 on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All rows being decoded."""

    cache: Any  # KVCache; None where only the rest is handled
    token: jax.Array  # int32 [slots]; the row's last token, not in the cache yet
    position: jax.Array  # int32 [slots]; its position
    row: jax.Array  # int32 [slots]; the row's number in the call, on which its draws depend
    drawn: jax.Array  # int32 [slots]; tokens drawn, and the column that the next token gets
    running: jax.Array  # bool [slots]
    stopped: jax.Array  # bool [slots]; ended by a stop token
    tokens: jax.Array  # int32 [slots, columns]; what was drawn
    logprobs: jax.Array  # float32 [slots, columns]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """Rows that enter slots, all of them samples of ``Prompts`` of one prefill."""

    places: jax.Array  # int32 [places]; the first ``count`` get a prompt
    entries: jax.Array  # int32 [places]; which prompt
    count: jax.Array  # int32 scalar
    fresh: jax.Array  # bool [slots]; True where a row enters
    token: jax.Array  # int32 [slots]; the last token of its prompt
    position: jax.Array  # int32 [slots]; that token's position
    row: jax.Array  # int32 [slots]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What the host learns after some steps: fields of ``Slots``, which are donated themselves."""

    running: jax.Array
    stopped: jax.Array
    drawn: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, and which end a row."""

    key: jax.Array  # typed PRNG key of the call
    stop_ids: jax.Array  # int32 [stops]
    temperature: jax.Array  # float32 scalar
    top_p: jax.Array  # float32 scalar
    top_k: jax.Array  # int32 scalar


def empty_slots(
    model: ModelConfig,
    rows: int,
    places: int,
    width: int,
    columns: int,
    dtype: Any,
    unstacked: bool,
) -> Slots:
    """Slots without rows; arguments as ``KVCache.empty`` takes them, all static."""
    cache = KVCache.empty(model, rows, places, width, columns, dtype, unstacked)
    zero, nothing = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    tokens = jnp.zeros((rows, columns), jnp.int32)
    logprobs = jnp.zeros((rows, columns), jnp.float32)
    return pinned(Slots(cache, zero, zero, zero, zero, nothing, nothing, tokens, logprobs))


def pinned(slots: Slots) -> Slots:
    """The same slots, laid out on the mesh in the one way that all programs expect.

    Caches are cut up like the student; the rest is small and whole on every chip, so that every
    host can read it.
    """

    def kv(stack: Stack) -> Stack:
        return stack if isinstance(stack, tuple) else jax.tree.map(_pinned_kv, stack)

    cache = slots.cache
    cache = KVCache(
        kv(cache.prompt_k),
        kv(cache.prompt_v),
        sharding.constrain(cache.prompt_positions, "batch", None),
        kv(cache.k),
        kv(cache.v),
        sharding.constrain(cache.positions, "batch", None),
    )
    return dataclasses.replace(_whole(dataclasses.replace(slots, cache=None)), cache=cache)


def _pinned_kv(stack: jax.Array) -> jax.Array:
    return sharding.constrain(stack, "layers", "batch", "kv_heads", None, None)


def _whole(tree):
    return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), tree)


def prefill(
    graphdef: nnx.GraphDef, lora: nnx.State, base: nnx.State, tokens: jax.Array, mask: jax.Array
) -> Prompts:
    """Computes what rows read of their prompts.

    Args:
      graphdef: the student's; static.
      lora: adapters.
      base: frozen weights.
      tokens: int32 [prompts, columns], left-padded, without each prompt's last token.
      mask: bool [prompts, columns].
    """
    positions = jnp.cumsum(mask, -1) - 1
    k, v = merge(graphdef, lora, base).prefill(tokens, jnp.maximum(positions, 0), mask)
    return Prompts(
        _pinned_kv(k),
        _pinned_kv(v),
        sharding.constrain(jnp.where(mask, positions, -1), "batch", None),
    )


def admit(slots: Slots, prompts: Prompts, admission: Admission) -> Slots:
    """Lets rows enter: their prompts go to their places, and their slots begin anew.

    Called outside jit, with ``slots`` donated: one small program serves all layers.
    """
    where = (admission.places, admission.entries, admission.count)

    def put(stack: Stack, source: jax.Array, vectors: int) -> Stack:
        if isinstance(stack, tuple):
            return tuple(
                _put_layer(old, source, np.int32(layer), *where, vectors)
                for layer, old in enumerate(stack)
            )
        return _put_stack(stack, source, *where, vectors)

    cache = slots.cache
    rest = dataclasses.replace(slots, cache=None)
    rest, prompt_positions, positions = _begin(
        rest, cache.prompt_positions, cache.positions, prompts.positions, admission
    )
    cache = KVCache(
        put(cache.prompt_k, prompts.k, KEY_AXIS),
        put(cache.prompt_v, prompts.v, VALUE_AXIS),
        prompt_positions,
        cache.k,
        cache.v,
        positions,
    )
    return dataclasses.replace(rest, cache=cache)


def _put(
    held: Packed, source: jax.Array, places, entries, count, axis: int, vectors: int
) -> Packed:
    """``held`` with ``source``'s first ``count`` entries, one of each per place along ``axis``."""

    def copy(number: jax.Array, held: Packed) -> Packed:
        one = jax.lax.dynamic_slice_in_dim(source, entries[number], 1, axis)

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, places[number], axis)

        return jax.tree.map(write, held, pack(one, held, vectors))

    return jax.lax.fori_loop(0, count, copy, held)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="vectors")
def _put_layer(
    held: Packed, source: jax.Array, layer, places, entries, count, vectors: int
) -> Packed:
    source = jax.lax.dynamic_index_in_dim(source, layer, keepdims=False)
    return _put(held, source, places, entries, count, 0, vectors)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="vectors")
def _put_stack(held: Packed, source: jax.Array, places, entries, count, vectors: int) -> Packed:
    return jax.tree.map(_pinned_kv, _put(held, source, places, entries, count, 1, vectors))


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def _begin(
    slots: Slots,
    prompt_positions: jax.Array,
    positions: jax.Array,
    source: jax.Array,
    admission: Admission,
) -> tuple[Slots, jax.Array, jax.Array]:
    """The part of ``admit`` that is no keys and values."""
    where = (admission.places, admission.entries, admission.count)
    prompt_positions = cast(jax.Array, _put(prompt_positions, source, *where, 0, -1))
    fresh = admission.fresh
    slots = dataclasses.replace(
        slots,
        token=jnp.where(fresh, admission.token, slots.token),
        position=jnp.where(fresh, admission.position, slots.position),
        row=jnp.where(fresh, admission.row, slots.row),
        drawn=jnp.where(fresh, 0, slots.drawn),
        running=slots.running | fresh,
        stopped=slots.stopped & ~fresh,
    )
    positions = jnp.where(fresh[:, None], -1, positions)
    return (
        _whole(slots),
        sharding.constrain(prompt_positions, "batch", None),
        sharding.constrain(positions, "batch", None),
    )


def decode(
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    base: nnx.State,
    slots: Slots,
    *,
    drawing: Drawing,
    wanted: jax.Array,
    enough: jax.Array,
    adapters: bool,
    greedy: bool,
    truncated: bool,
) -> tuple[Slots, Report]:
    """Draws tokens for all running rows until ``enough`` rows have ended, or all.

    Args:
      graphdef: the student's; static.
      lora: adapters.
      base: frozen weights.
      slots: donated.
      drawing: distribution and stop tokens.
      wanted: bool [slots]; rows where it is False end at once.
      enough: int32 scalar, at least 1.
      adapters: static; False where they are merged into ``base``.
      greedy: static.
      truncated: static.
    """
    model = merge(graphdef, lora, base)
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, drawing.key))(slots.row)
    columns = slots.tokens.shape[1]
    started = slots.running

    def more(slots: Slots) -> jax.Array:
        ended = (started & ~slots.running).sum()
        return slots.running.any() & (ended < enough)

    def advance(slots: Slots) -> Slots:
        hidden, cache = model.decode(
            slots.token, slots.position, slots.cache, slots.drawn, adapters
        )
        uniforms = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(row_keys, slots.drawn))
        token, logprob = draw_token(
            model.logits(hidden),
            uniforms,
            drawing.temperature,
            drawing.top_p,
            drawing.top_k,
            greedy=greedy,
            truncated=truncated,
        )
        running = slots.running
        here = running[:, None] & (jnp.arange(columns)[None] == slots.drawn[:, None])
        drawn = slots.drawn + running
        is_stop = running & (token[:, None] == drawing.stop_ids[None]).any(-1)
        return pinned(
            dataclasses.replace(
                slots,
                cache=cache,
                token=token,
                position=slots.position + 1,
                drawn=drawn,
                running=running & ~is_stop & (drawn < columns),
                stopped=slots.stopped | is_stop,
                tokens=jnp.where(here, token[:, None], slots.tokens),
                logprobs=jnp.where(here, logprob[:, None], slots.logprobs),
            )
        )

    slots = dataclasses.replace(slots, running=started & wanted)
    slots = jax.lax.while_loop(more, advance, slots)
    report = Report(slots.running, slots.stopped, slots.drawn, slots.tokens, slots.logprobs)
    return slots, report
