"""The decoder: layers stacked and scanned between the embedding and the vocabulary.

Every per-layer weight carries a leading ``layers`` axis and the layer body is traced once, so
compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.student.attention import Attention, attend, attend_group
from cosr_jax.student.blockwise import Places
from cosr_jax.student.cache import KVCache, attend_cached
from cosr_jax.student.layers import LayerContext, LayerKind, Linear, RMSNorm, Window
from cosr_jax.student.lora import adapted_names
from cosr_jax.student.mlp import Mlp
from cosr_jax.student.moe import ExpertLinear, Moe, chosen_experts
from cosr_jax.student.names import linear_layers, linear_names
from cosr_jax.student.routing import RouterLoad, no_load
from cosr_jax.student.shape import ModelConfig
from cosr_jax.student.stacks import kept, sliceable, sliced, stackable
from cosr_jax.student.unstacked import choose_layer, split_stacked
from cosr_jax.types import UserError

#: Of a decoder without experts.
LINEARS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


#: What each way of rematerialisation keeps for the backward pass, by the names that the layers'
#: parts give to it, besides a layer's input; the rest is computed again.
KEPT: dict[str, tuple[str, ...]] = {
    "layer": (),
    "mlp": ("attention",),
    "dots": ("attention", "mlp"),
}


#: Tokens in a tile of bfloat16 on a TPU.
_TILE = 16


class Block(nnx.Module):
    """One decoder layer with pre-norms, and post-norms where the family has them.

    Made stacked, applied one layer at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_linear: Callable[..., Linear],
        make_expert_linear: Callable[..., ExpertLinear],
        param_dtype: Any,
    ):
        def norm() -> RMSNorm:
            layers, size, eps = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
            return RMSNorm(layers, size, eps, param_dtype, config.norm_offset)

        self.post_norms = config.post_norms
        self.attn_norm = norm()
        self.attn = Attention(config, make_linear, param_dtype)
        self.mlp_norm = norm()
        self.is_mixed = bool(config.dense_layers and config.sparse_layers)
        if config.dense_layers:
            self.mlp = Mlp(config, make_linear)
        if config.sparse_layers:
            self.moe = Moe(config, make_expert_linear, param_dtype)
        if self.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(self, x, context: LayerContext, layer: LayerKind, dropout_key, attend):
        keys: list[Any] = [None] * len(LINEARS)
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, len(LINEARS)))
        x = sharding.constrain(x, "batch", "time", "hidden")
        attended, kv = self.attn(self.attn_norm(x), context, layer, keys[:4], attend)
        attended = kept(attended, "attention")
        x = x + (self.attn_post_norm(attended) if self.post_norms else attended)
        fed, load = self._feed(self.mlp_norm(x), context, layer, keys[4:])
        return x + (self.mlp_post_norm(fed) if self.post_norms else fed), kv, load

    def _feed(
        self, x, context: LayerContext, layer: LayerKind, keys: list[Any]
    ) -> tuple[jax.Array, RouterLoad | None]:
        def mix(x):
            # The count computes the router's numbers once more, outside the experts' exchange
            # between chips; on one chip the compiler sees that they are the same.
            load = None
            if context.counts is not None:
                tokens = x.reshape(-1, x.shape[-1])
                load = self.moe.router.load(tokens, context.counts.reshape(-1))
            return self.moe(x, context, layer), load

        def feed(x):
            load = None
            if context.counts is not None:
                load = no_load(self.moe.config.num_experts)
            return self.mlp(x, context, keys), load

        if not self.is_mixed:
            return mix(x) if hasattr(self, "moe") else feed(x)
        return jax.lax.cond(layer.is_sparse, mix, feed, x)


class Decoder(nnx.Module):
    """The whole student; weights start at zero (ones for norms) and are filled by ``weights``."""

    def __init__(
        self,
        config: ModelConfig,
        lora: LoraConfig | None,
        param_dtype: Any,
        compute_dtype: Any,
        remat: str,
    ):
        adapted = () if lora is None else adapted_names(lora, linear_names(config))

        def make_linear(
            name: str,
            in_features: int,
            out_features: int,
            axes: tuple[str, str],
            bias: bool = False,
        ):
            layers, own = len(linear_layers(config, name)), lora if name in adapted else None
            return Linear(layers, in_features, out_features, axes, param_dtype, own, bias)

        def make_expert_linear(
            name: str, in_features: int, out_features: int, axes: tuple[str, str]
        ):
            layers, own = len(config.sparse_layers), lora if name in adapted else None
            if own is not None and own.dropout:
                raise UserError(
                    f"config.lora.dropout: {own.dropout} does not go with adapters of experts",
                    "set it to 0, or leave the experts (moe...) out of config.lora.targets",
                )
            moe = config.moe
            assert moe is not None
            return ExpertLinear(
                layers,
                moe.num_experts,
                in_features,
                out_features,
                axes,
                param_dtype,
                own,
                moe.clamped,
            )

        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.embed = nnx.Param(
            jnp.zeros((config.vocab_size, config.hidden_size), param_dtype),
            axes=("vocab", "hidden"),
        )
        self.layers = Block(config, make_linear, make_expert_linear, param_dtype)
        self.chosen_experts = None if lora is None else chosen_experts(config, lora)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm = RMSNorm(None, size, eps, param_dtype, config.norm_offset)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(
                jnp.zeros((config.hidden_size, config.vocab_size), param_dtype),
                axes=("hidden", "vocab"),
            )

    def head_kernel(self) -> jax.Array:
        """The output projection, param dtype [hidden, vocab]."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., vocab] of final hidden states [..., hidden]."""
        # The embedding as it lies: of a transposed matrix of bfloat16 a CPU makes float32 first.
        is_tied = self.config.tie_word_embeddings
        weight = self.embed[...] if is_tied else self.lm_head[...]
        axes = ("vocab", "hidden") if is_tied else ("hidden", "vocab")
        return project(hidden, weight, axes, self.config.logit_softcap)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        adapters: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states of whole sequences.

        Args:
          tokens: int32 [batch, time].
          positions: int32 [batch, time], counted from 0 in each segment.
          segment_ids: int32 [batch, time]; a token sees earlier ones of its own segment; 0 is
            padding.
          adapters: False computes the reference policy: the student without its adapters.
          dropout_key: of the adapters' dropout; None switches it off.

        Returns:
          Normalised hidden states, compute dtype [batch, time, hidden]; ``logits`` projects them.
        """
        return self.routed(tokens, positions, segment_ids, adapters, dropout_key)[0]

    def routed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        adapters: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterLoad | None]:
        """As a call, and the routers' load by layer; None where there are no experts."""
        hidden, _, load = self._forward(
            tokens, positions, segment_ids, adapters, dropout_key, False
        )
        return hidden, load

    def continuations(
        self,
        prompt_tokens: jax.Array,
        prompt_mask: jax.Array,
        completion_tokens: jax.Array,
        completion_mask: jax.Array,
        adapters: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterLoad | None]:
        """Hidden states that predict completions, with each prompt computed once for its group.

        The same as a call on prompts repeated for every row, in value and gradient: completions
        see the prompt's keys and values, and hand back what they ask of them.

        Args:
          prompt_tokens: int32 [prompts, prompt], padded on the left.
          prompt_mask: bool [prompts, prompt]; False on padding.
          completion_tokens: int32 [rows, completion], padded on the right; row i continues prompt
            i // (rows / prompts).
          completion_mask: bool [rows, completion]; False on padding.
          adapters: as in ``__call__``.
          dropout_key: as in ``__call__``.

        Returns:
          Normalised hidden states, compute dtype [rows, completion, hidden]; those at t predict
          completion token t, and those at 0 are the prompt's last.  Then the routers' load by
          layer, over the tokens of all rows; None where there are no experts.
        """
        prompts, rows, time = len(prompt_tokens), *completion_tokens.shape
        group = rows // prompts
        # To whole tiles: where rows end within one, a TPU copies whatever it takes row by row.
        padding = -(prompt_tokens.shape[1] + group * time) % _TILE
        start = padding + prompt_tokens.shape[1]

        def joined(prompt: jax.Array, completions: jax.Array, filler: int) -> jax.Array:
            """[prompts, start + group * time]: what is not attention meets both at once."""
            empty = jnp.full((prompts, padding), filler, prompt.dtype)
            return jnp.concatenate([empty, prompt, completions.reshape(prompts, -1)], axis=1)

        # -1 on padding.
        tokens = joined(
            jnp.where(prompt_mask, prompt_tokens, -1),
            jnp.where(completion_mask, completion_tokens, -1),
            -1,
        )
        lengths = prompt_mask.sum(1, dtype=jnp.int32, keepdims=True)
        column = jnp.arange(start + group * time, dtype=jnp.int32)[None]
        # Completions all go on where their prompt ends, which is at column ``start``.
        column = jnp.where(column < start, column, start + (column - start) % time)
        positions = jnp.maximum(lengths + column - start, 0)
        places = Places((tokens >= 0).astype(jnp.int32), positions)
        # Routers count a prompt's tokens once for each row that goes on from it.
        followers = completion_mask.any(1).reshape(-1, group).sum(1, keepdims=True)
        counts = joined(prompt_mask * followers, completion_mask.astype(followers.dtype), 0)
        context = self._context(positions, adapters, counts)
        state, build = self._stack()

        def attend_parted(q, k, v, window, sinks):
            return attend_group(q, k, v, places, start, rows, window, sinks)

        def layer(x, inputs):
            weights, kind, key = inputs
            x, _, load = build(weights, kind)(x, context, kind, key, attend_parted)
            return x, load

        x = self._embed(jnp.maximum(tokens, 0))
        x, load = self._scan(layer, x, state, dropout_key)
        first = jnp.repeat(x[:, start - 1 : start], group, axis=0)
        x = x[:, start:].reshape(rows, time, -1)
        return self.norm(jnp.concatenate([first, x[:, :-1]], axis=1)), load

    def prefill(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        adapters: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of prompts, to decode with.

        Args:
          tokens: int32 [prompts, time].
          positions: int32 [prompts, time].
          mask: bool [prompts, time]; False on padding.
          adapters: as in ``__call__``.

        Returns:
          Keys [layers, prompts, kv_heads, head_dim, time] and values [layers, prompts, kv_heads,
          time, head_dim], as ``KVCache`` keeps them.
        """
        _, (k, v), _ = self._forward(
            tokens, positions, mask.astype(jnp.int32), adapters, None, True
        )
        k, v = (stack.astype(self.compute_dtype) for stack in (k, v))
        return jnp.transpose(k, (0, 1, 3, 4, 2)), jnp.swapaxes(v, 2, 3)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        column: jax.Array,
        adapters: bool = True,
    ) -> tuple[jax.Array, KVCache]:
        """One token for every row.

        Args:
          tokens: int32 [rows].
          positions: int32 [rows].
          cache: its generated part gets these tokens' keys and values at ``column``.
          column: int32 [rows].
          adapters: as in ``__call__``.

        Returns:
          Hidden states [rows, hidden] and the cache.
        """
        x = self._embed(tokens[:, None])
        context = self._context(positions[:, None], adapters)
        state, build = self._stack()
        unstacked, stacked = split_stacked(state)

        def layer(x, inputs):
            number, weights, kind = inputs

            def attend_past(q, k, v, window, sinks):
                back = None if window is None else window.tokens
                new = attend_cached(
                    q[:, 0], k[:, 0], v[:, 0], cache, number, positions, back, sinks
                )
                return new[:, None]

            weights = nnx.merge_state(choose_layer(unstacked, number), sliced(weights))
            x, kv, _ = build(weights, kind)(x, context, kind, None, attend_past)
            return x, stackable(kv)

        numbers = jnp.arange(self.config.num_hidden_layers)
        x, (k, v) = jax.lax.scan(layer, x, (numbers, sliceable(stacked), self._kinds()))
        k, v = (new[:, :, 0].astype(x.dtype) for new in (k, v))
        return self.norm(x)[:, 0], cache.append(k, v, positions, column)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Each chip looks up what its share of the vocabulary holds, for all rows of its replica.
        tokens = sharding.constrain(tokens, "replica", "time")
        x = jnp.take(self.embed[...], tokens, axis=0).astype(self.compute_dtype)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return sharding.constrain(x, "batch", "time", "hidden")

    def _context(self, positions, adapters, counts=None) -> LayerContext:
        frequencies, factors, rotation = self.config.rotations()
        # [kinds, batch, time, 1, head_dim / 2]; without kinds where layers are all of the first.
        shape: tuple[int, ...] = (len(factors), 1, 1, 1, -1)
        if not rotation.any():
            frequencies, factors, shape = frequencies[0], factors[:1], shape[1:]
        where = positions.reshape(*[1] * (len(shape) - 4), *positions.shape, 1, 1)
        angles = where.astype(jnp.float32) * frequencies.reshape(shape)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if (factors != 1.0).any():
            hotter = factors.reshape(shape)
            cos, sin = cos * hotter, sin * hotter
        return LayerContext(cos, sin, adapters, None if self.config.moe is None else counts)

    def _kinds(self) -> LayerKind:
        """In what the layers differ, stacked like their weights."""
        _, _, rotation = self.config.rotations()
        window = self.config.windows()
        return LayerKind(
            jnp.asarray(rotation) if rotation.any() else None,
            None if window is None else Window(jnp.asarray(window), self.config.sliding_window),
            *self._mlp_kinds(),
        )

    def _mlp_kinds(self) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        is_sparse = np.isin(np.arange(self.config.num_hidden_layers), self.config.sparse_layers)
        row = np.where(is_sparse, np.cumsum(is_sparse), np.cumsum(~is_sparse)) - 1
        chosen = None
        if self.chosen_experts is not None:
            chosen = jnp.asarray(self.chosen_experts)
        if not self.layers.is_mixed:
            return None, None, chosen
        return jnp.asarray(is_sparse), jnp.asarray(row, jnp.int32), chosen

    def _stack(self) -> tuple[nnx.State, Callable[[nnx.State, LayerKind], Block]]:
        """The layers' weights as a scan slices them, and how a slice becomes a layer again.

        Where only some layers have experts there are two shorter stacks beside, of plain MLPs and
        of mixtures; every layer takes its row of its own kind's.
        """
        if not self.layers.is_mixed:
            graphdef, state = nnx.split(self.layers)
            return state, lambda weights, _: nnx.merge(graphdef, weights)
        graphdef, *states = nnx.split(
            self.layers, nnx.PathContains("mlp"), nnx.PathContains("moe"), ...
        )
        mlp, moe, state = states

        def build(weights: nnx.State, kind: LayerKind) -> Block:
            def rows(stack: nnx.State) -> nnx.State:
                return jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, kind.row, keepdims=False),
                    sliceable(stack),
                )

            return nnx.merge(graphdef, sliced(rows(mlp)), sliced(rows(moe)), weights)

        return state, build

    def _forward(self, tokens, positions, segment_ids, adapters, dropout_key, keep_kv):
        x = self._embed(tokens)
        places = Places(segment_ids, positions)
        context = self._context(positions, adapters, segment_ids > 0)
        state, build = self._stack()

        def attend_segments(q, k, v, window, sinks):
            return attend(q, k, v, places, window, sinks)

        def layer(x, inputs):
            weights, kind, key = inputs
            x, kv, load = build(weights, kind)(x, context, kind, key, attend_segments)
            return x, (stackable(kv) if keep_kv else None, load)

        x, (kept, load) = self._scan(layer, x, state, dropout_key)
        return self.norm(x), kept, load

    def _scan(self, layer, start, state, dropout_key):
        """``layer`` over all layers, keeping for the backward pass what ``remat`` says."""

        def step(carried, inputs):
            weights, *others = inputs
            carried = jax.tree.map(lambda x, like: x.astype(like.dtype), carried, start)
            carried, found = layer(carried, (sliced(weights), *others))
            return stackable(carried), found

        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.remat])
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_hidden_layers)
        inputs = sliceable(state), self._kinds(), keys
        carried, found = jax.lax.scan(step, stackable(start), inputs)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), carried, start), found


def project(
    hidden: jax.Array, weight: jax.Array, axes: tuple[str, str], softcap: float = 0.0
) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden].

    Unless ``softcap`` is 0.0, logits become softcap * tanh(logits / softcap).

    On a mesh every chip multiplies all tokens of its replica by its share of the vocabulary.

    Args:
      hidden: [..., hidden].
      weight: the output projection, its two axes in the order of ``axes``.
      axes: ("hidden", "vocab"), or the other way round.
      softcap: of the logits.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    tokens = sharding.constrain(tokens, "replica", "hidden")
    weight = sharding.constrain(weight.astype(hidden.dtype), *axes)
    contracted = ((1,), (axes.index("hidden"),)), ((), ())
    logits = jax.lax.dot_general(tokens, weight, contracted, preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits, "replica", "vocab")
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits.reshape(*hidden.shape[:-1], -1)
