"""What runs on the device during a rollout: prompts to caches, rows into slots, tokens drawn.

A slot decodes one row, a sample of a prompt.  All slots take a step together; a row that has ended
leaves its slot to another, so slots are at different tokens of their rows.  Shapes never change.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax import sharding
from cosr_jax.rollout.sampling import draw_token, row_keys, uniforms
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
    """Which of the prompts of one prefill go where."""

    places: np.ndarray  # int32 [places]; the first ``count`` get a prompt
    entries: np.ndarray  # int32 [places]; which prompt
    count: np.int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """What the host says before the device decodes on."""

    fresh: Any  # bool [slots]; True where a row enters
    token: Any  # int32 [slots]; the last token of its prompt
    position: Any  # int32 [slots]; that token's position
    row: Any  # int32 [slots]; its number in the call
    prompt_positions: Any  # int32 [places, columns]; of all prompts in their places, -1 on padding
    wanted: Any  # bool [slots]; rows where it is False end at once
    enough: Any  # int32 scalar, at least 1: how many rows may end before the host hears of it


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

    key: Any  # uint32 [2]; of the call
    stops: Any  # bool [vocab]; tokens that end a row
    temperature: Any  # float32 scalar
    top_p: Any  # float32 scalar
    top_k: Any  # int32 scalar


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
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    base: nnx.State,
    tokens: jax.Array,
    positions: jax.Array,
) -> Prompts:
    """Computes what rows read of their prompts.

    Args:
      graphdef: the student's; static.
      lora: adapters.
      base: frozen weights.
      tokens: int32 [prompts, columns], left-padded, without each prompt's last token.
      positions: int32 [prompts, columns]; -1 on padding.
    """
    model = merge(graphdef, lora, base)
    k, v = model.prefill(tokens, jnp.maximum(positions, 0), positions >= 0)
    return Prompts(_pinned_kv(k), _pinned_kv(v))


def admit(slots: Slots, prompts: Prompts, admission: Admission) -> Slots:
    """Brings prompts to their places.

    Called outside jit, with ``slots`` donated: one small program serves all layers.
    """
    where = (admission.places, admission.entries, admission.count)
    cache = slots.cache
    held, source = (cache.prompt_k, cache.prompt_v), (prompts.k, prompts.v)
    if isinstance(cache.prompt_k, tuple):
        layers = zip(*held, strict=True)
        k, v = zip(
            *(_put_layer(old, source, np.int32(i), *where) for i, old in enumerate(layers)),
            strict=True,
        )
    else:
        k, v = _put_stack(held, source, *where)
    return dataclasses.replace(slots, cache=dataclasses.replace(cache, prompt_k=k, prompt_v=v))


#: Keys and values.
_Pair = tuple[Packed, Packed]


def _put(
    held: _Pair, source: tuple[jax.Array, jax.Array], places, entries, count, axis: int
) -> _Pair:
    """``held`` with ``source``'s first ``count`` entries, one of each per place along ``axis``."""

    def copy(number: jax.Array, held: _Pair) -> _Pair:
        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, places[number], axis)

        def put(held: Packed, source: jax.Array, vectors: int) -> Packed:
            one = jax.lax.dynamic_slice_in_dim(source, entries[number], 1, axis)
            return jax.tree.map(write, held, pack(one, held, vectors))

        return put(held[0], source[0], KEY_AXIS), put(held[1], source[1], VALUE_AXIS)

    return jax.lax.fori_loop(0, count, copy, held)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(
    held: _Pair, source: tuple[jax.Array, jax.Array], layer, places, entries, count
) -> _Pair:
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in source)
    return _put(held, (k, v), places, entries, count, 0)


@functools.partial(jax.jit, donate_argnums=0)
def _put_stack(held: _Pair, source: tuple[jax.Array, jax.Array], places, entries, count) -> _Pair:
    return jax.tree.map(_pinned_kv, _put(held, source, places, entries, count, 1))


def _begin(slots: Slots, turn: Turn) -> Slots:
    """Lets the turn's fresh rows begin in their slots, and unwanted ones end."""
    fresh = turn.fresh
    cache = dataclasses.replace(
        slots.cache,
        prompt_positions=turn.prompt_positions,
        positions=jnp.where(fresh[:, None], -1, slots.cache.positions),
    )
    return pinned(
        dataclasses.replace(
            slots,
            cache=cache,
            token=jnp.where(fresh, turn.token, slots.token),
            position=jnp.where(fresh, turn.position, slots.position),
            row=jnp.where(fresh, turn.row, slots.row),
            drawn=jnp.where(fresh, 0, slots.drawn),
            running=(slots.running | fresh) & turn.wanted,
            stopped=slots.stopped & ~fresh,
        )
    )


def decode(
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    base: nnx.State,
    slots: Slots,
    *,
    drawing: Drawing,
    turn: Turn,
    adapters: bool,
    greedy: bool,
    truncated: bool,
) -> tuple[Slots, Report]:
    """Draws tokens for all running rows until as many have ended as the host said, or all.

    Args:
      graphdef: the student's; static.
      lora: adapters.
      base: frozen weights.
      slots: donated.
      drawing: distribution and stop tokens.
      turn: which rows enter and which are wanted.
      adapters: static; False where they are merged into ``base``.
      greedy: static.
      truncated: static.
    """
    model = merge(graphdef, lora, base)
    started = slots.running | turn.fresh
    slots = _begin(slots, turn)
    keys, columns = row_keys(drawing.key, slots.row), slots.tokens.shape[1]

    def more(slots: Slots) -> jax.Array:
        running = slots.running.sum()
        return (running > 0) & (started.sum() - running < turn.enough)

    def advance(slots: Slots) -> Slots:
        hidden, cache = model.decode(
            slots.token, slots.position, slots.cache, slots.drawn, adapters
        )
        token, logprob = draw_token(
            model.logits(hidden),
            uniforms(keys, slots.drawn),
            drawing.temperature,
            drawing.top_p,
            drawing.top_k,
            greedy=greedy,
            truncated=truncated,
        )
        running = slots.running
        here = running[:, None] & (jnp.arange(columns)[None] == slots.drawn[:, None])
        drawn = slots.drawn + running
        is_stop = running & jnp.take(drawing.stops, token, mode="clip")
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

    slots = jax.lax.while_loop(more, advance, slots)
    report = Report(slots.running, slots.stopped, slots.drawn, slots.tokens, slots.logprobs)
    return slots, report
