"""The decoder: layers stacked and scanned between the embedding and the vocabulary.

Every per-layer weight carries a leading ``layers`` axis and the layer body is traced once, so
compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosr_jax import sharding
from cosr_jax.config import LoraConfig
from cosr_jax.student.attention import Attention, attend, causal_mask, within_window
from cosr_jax.student.cache import KVCache, attend_cached
from cosr_jax.student.layers import LayerContext, LayerKind, Linear, RMSNorm
from cosr_jax.student.lora import adapted_names
from cosr_jax.student.mlp import Mlp
from cosr_jax.student.names import linear_names
from cosr_jax.student.shape import ModelConfig

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


class Block(nnx.Module):
    """One decoder layer with pre-norms, and post-norms where the family has them.

    Made stacked, applied one layer at a time.
    """

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear], param_dtype: Any):
        def norm() -> RMSNorm:
            layers, size, eps = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
            return RMSNorm(layers, size, eps, param_dtype, config.norm_offset)

        self.post_norms = config.post_norms
        self.attn_norm = norm()
        self.attn = Attention(config, make_linear, param_dtype)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, make_linear)
        if self.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(self, x, context: LayerContext, layer: LayerKind, dropout_key, attend):
        keys: list[Any] = [None] * len(LINEARS)
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, len(LINEARS)))
        x = sharding.constrain(x, "batch", "time", "hidden")
        attended, kv = self.attn(self.attn_norm(x), context, layer, keys[:4], attend)
        x = x + (self.attn_post_norm(attended) if self.post_norms else attended)
        fed = self.mlp(self.mlp_norm(x), context, keys[4:])
        return x + (self.mlp_post_norm(fed) if self.post_norms else fed), kv


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
            own = lora if name in adapted else None
            return Linear(
                config.num_hidden_layers, in_features, out_features, axes, param_dtype, own, bias
            )

        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.embed = nnx.Param(
            jnp.zeros((config.vocab_size, config.hidden_size), param_dtype),
            axes=("vocab", "hidden"),
        )
        self.layers = Block(config, make_linear, param_dtype)
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
        return project(hidden, self.head_kernel(), self.config.logit_softcap)

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
        hidden, _ = self._forward(tokens, positions, segment_ids, adapters, dropout_key, False)
        return hidden

    def prefill(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        num_generations: int,
        columns: int,
        adapters: bool = True,
    ) -> tuple[jax.Array, KVCache]:
        """Like a call on left-padded prompts, and also makes the cache to decode with.

        Args:
          tokens: int32 [prompts, time].
          positions: int32 [prompts, time].
          mask: bool [prompts, time]; False on padding.
          num_generations: rows that will be decoded for each prompt.
          columns: room for generated tokens.
          adapters: as in ``__call__``.

        Returns:
          Hidden states [prompts, time, hidden] and a cache for prompts * num_generations rows.
        """
        hidden, (k, v) = self._forward(
            tokens, positions, mask.astype(jnp.int32), adapters, None, True
        )
        k, v = (jnp.swapaxes(x, 2, 3) for x in (k, v))
        layers, prompts, kv_heads, _, head_dim = k.shape
        shape = (layers, prompts * num_generations, kv_heads, columns, head_dim)

        def empty() -> jax.Array:
            cache = jnp.zeros(shape, k.dtype)
            return sharding.constrain(cache, "layers", "batch", "kv_heads", None, None)

        return hidden, KVCache(k, v, mask, empty(), empty())

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
          column: int32 scalar, the same for all rows.
          adapters: as in ``__call__``.

        Returns:
          Hidden states [rows, hidden] and the cache.
        """
        x = self._embed(tokens[:, None])
        context = self._context(positions[:, None], adapters)
        graphdef, state = nnx.split(self.layers)

        def layer(x, inputs):
            weights, kind, (prompt_k, prompt_v, own_k, own_v) = inputs
            past = KVCache(prompt_k, prompt_v, cache.prompt_mask, own_k, own_v)

            def attend_past(q, k, v, window, sinks):
                new = attend_cached(
                    q[:, 0], past, k[:, 0], v[:, 0], column, positions, window, sinks
                )
                return new[:, None]

            return nnx.merge(graphdef, weights)(x, context, kind, None, attend_past)

        stacked = (cache.prompt_k, cache.prompt_v, cache.k, cache.v)
        x, (k, v) = jax.lax.scan(layer, x, (state, self._kinds(), stacked))
        # Written once for all layers: an update inside the scan would copy the cache every layer.
        start = (0, 0, 0, column, 0)
        cache = dataclasses.replace(
            cache,
            k=jax.lax.dynamic_update_slice(cache.k, jnp.swapaxes(k, 2, 3), start),
            v=jax.lax.dynamic_update_slice(cache.v, jnp.swapaxes(v, 2, 3), start),
        )
        return self.norm(x)[:, 0], cache

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Each chip looks up what its share of the vocabulary holds, for all rows of its replica.
        tokens = sharding.constrain(tokens, "replica", "time")
        x = jnp.take(self.embed[...], tokens, axis=0).astype(self.compute_dtype)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return sharding.constrain(x, "batch", "time", "hidden")

    def _context(self, positions, adapters) -> LayerContext:
        frequencies, factors, _ = self.config.rotations()
        angles = positions[None, ..., None, None].astype(jnp.float32) * jnp.asarray(
            frequencies
        ).reshape(len(factors), 1, 1, 1, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if (factors != 1.0).any():
            hotter = jnp.asarray(factors).reshape(-1, 1, 1, 1, 1)
            cos, sin = cos * hotter, sin * hotter
        return LayerContext(cos, sin, adapters)

    def _kinds(self) -> LayerKind:
        """In what the layers differ, stacked like their weights."""
        _, _, rotation = self.config.rotations()
        window = self.config.windows()
        return LayerKind(
            jnp.asarray(rotation) if rotation.any() else None,
            None if window is None else jnp.asarray(window),
        )

    def _forward(self, tokens, positions, segment_ids, adapters, dropout_key, keep_kv):
        x = self._embed(tokens)
        mask = causal_mask(segment_ids)
        context = self._context(positions, adapters)
        graphdef, state = nnx.split(self.layers)

        def attend_segments(q, k, v, window, sinks):
            return attend(q, k, v, within_window(mask, positions, window), sinks)

        def layer(x, inputs):
            weights, kind, key = inputs
            x, kv = nnx.merge(graphdef, weights)(x, context, kind, key, attend_segments)
            return x, kv if keep_kv else None

        if self.remat == "layer":
            layer = jax.checkpoint(layer, prevent_cse=False)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_hidden_layers)
        x, kept = jax.lax.scan(layer, x, (state, self._kinds(), keys))
        return self.norm(x), kept


def project(hidden: jax.Array, kernel: jax.Array, softcap: float = 0.0) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden] under kernel [hidden, vocab].

    Unless ``softcap`` is 0.0, logits become softcap * tanh(logits / softcap).

    On a mesh every chip multiplies all tokens of its replica by its share of the vocabulary.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    tokens = sharding.constrain(tokens, "replica", "hidden")
    kernel = sharding.constrain(kernel.astype(hidden.dtype), "hidden", "vocab")
    logits = jnp.matmul(tokens, kernel, preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits, "replica", "vocab")
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits.reshape(*hidden.shape[:-1], -1)
