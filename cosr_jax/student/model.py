"""The student: a Llama-family decoder in Flax NNX whose layers are stacked and scanned.

Every per-layer weight carries a leading ``layers`` axis and the layer body is traced once, so
compile time does not grow with depth.  Outside this room the student is three values, a graph
definition and two pytrees, ``lora`` (trained) and ``base`` (frozen); ``merge`` turns them back into
the module inside a jitted function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student.lora import adapted_names, lora_scale
from cosr_jax.types import UserError

LINEARS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of RoPE for long contexts, in the terms of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder, in the terms of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None  # None for plain RoPE

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the content of a config.json (transformers 4 or 5 spelling).

        Raises:
          UserError: another architecture, a missing key, or an option that is not supported.
        """
        if values.get("model_type") != "llama":
            raise UserError(
                f"config.json: model_type {values.get('model_type')!r} is not supported",
                "use a Llama-family student (model_type 'llama', e.g. SmolLM2 or Llama 3)",
            )
        for key, wanted in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if values.get(key, wanted) != wanted:
                raise UserError(
                    f"config.json: {key} {values[key]!r} is not supported",
                    f"use a student with {key} {wanted!r}",
                )
        try:
            rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", "llama3"):
                raise UserError(
                    f"config.json: rope_type {kind!r} is not supported", "use 'default' or 'llama3'"
                )
            heads = int(values["num_attention_heads"])
            config = cls(
                vocab_size=int(values["vocab_size"]),
                hidden_size=int(values["hidden_size"]),
                intermediate_size=int(values["intermediate_size"]),
                num_hidden_layers=int(values["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(values.get("num_key_value_heads") or heads),
                head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
                rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
                rope_theta=float(values.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                rope_scaling=None
                if kind == "default"
                else RopeScaling(
                    **{f.name: float(rope[f.name]) for f in dataclasses.fields(RopeScaling)}
                ),
            )
        except KeyError as error:
            raise UserError(
                f"config.json: key {error} is missing", "take the file that came with the weights"
            ) from error
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"config.json: a value is of the wrong kind ({error})",
                "take the file that came with the weights",
            ) from error
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            if getattr(config, name) < 1:
                raise UserError(
                    f"config.json: {name} {getattr(config, name)} is under 1",
                    "take the file that came with the weights",
                )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"config.json: num_key_value_heads {config.num_key_value_heads} does not divide "
                f"num_attention_heads {config.num_attention_heads}",
                "take the file that came with the weights",
            )
        return config

    def inverse_frequencies(self) -> np.ndarray:
        """RoPE's frequencies, float32 [head_dim / 2] (arXiv:2104.09864, section 3.2.2).

        With ``rope_scaling``, long wavelengths are stretched by ``factor``, short ones kept, and
        those between blended linearly in the number of turns within the original context, as
        Llama 3.1 does (facebook's ``apply_scaling``; transformers ``_compute_llama3_parameters``).
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        frequencies = 1.0 / self.rope_theta**exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies.astype(np.float32)
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        stretched = frequencies / scaling.factor
        return (keep * frequencies + (1 - keep) * stretched).astype(np.float32)


class Linear(nnx.Module):
    """x W with an optional adapter; its weights are stacked over layers when made."""

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        param_dtype: Any,
        lora: LoraConfig | None,
    ):
        self.kernel = nnx.Param(
            jnp.zeros((num_layers, in_features, out_features), param_dtype),
            axes=("layers", *axes),
        )
        self.scale = 0.0 if lora is None else lora_scale(lora)
        self.dropout = 0.0 if lora is None else lora.dropout
        if lora is not None:
            self.lora_a = nnx.LoRAParam(
                jnp.zeros((num_layers, in_features, lora.rank), jnp.float32),
                axes=("layers", axes[0], "rank"),
            )
            self.lora_b = nnx.LoRAParam(
                jnp.zeros((num_layers, lora.rank, out_features), jnp.float32),
                axes=("layers", "rank", axes[1]),
            )

    def __call__(
        self, x: jax.Array, adapters: bool = True, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        # One token axis: adapter gradients that contract two axes miss XLA CPU's fast product.
        tokens = x.reshape(-1, x.shape[-1])
        out = tokens @ self.kernel[...].astype(x.dtype)
        if adapters and self.scale:
            inputs = tokens
            if self.dropout and dropout_key is not None:
                keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, inputs.shape)
                inputs = jnp.where(keep, inputs / (1 - self.dropout), 0)
            low = inputs @ self.lora_a[...].astype(x.dtype)
            out = out + (low * self.scale) @ self.lora_b[...].astype(x.dtype)
        return out.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (arXiv:1910.07467); stacked when ``num_layers`` is given."""

    def __init__(self, num_layers: int | None, size: int, eps: float, param_dtype: Any):
        stack, axes = ((), ()) if num_layers is None else ((num_layers,), ("layers",))
        self.weight = nnx.Param(jnp.ones((*stack, size), param_dtype), axes=(*axes, "norm"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE on x [batch, time, heads, head_dim]; cos and sin are [batch, time, 1, head_dim / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _LayerContext:
    """What every layer of one forward pass shares."""

    cos: jax.Array  # float32 [batch, time, 1, head_dim / 2]
    sin: jax.Array
    adapters: bool


class Attention(nnx.Module):
    """Grouped-query causal attention (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear]):
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        d, q, kv = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        self.q_proj = make_linear("attn.q_proj", d, q, ("embed", "heads"))
        self.k_proj = make_linear("attn.k_proj", d, kv, ("embed", "kv_heads"))
        self.v_proj = make_linear("attn.v_proj", d, kv, ("embed", "kv_heads"))
        self.o_proj = make_linear("attn.o_proj", q, d, ("heads", "embed"))

    def __call__(self, x, context: _LayerContext, keys: list[Any], attend):
        """``attend(q, k, v) -> [batch, time, heads, head_dim]``; also returns k and v."""
        batch, time, _ = x.shape

        def heads(linear: Linear, number: int, key: Any) -> jax.Array:
            return linear(x, context.adapters, key).reshape(batch, time, number, self.head_dim)

        q = rotate(heads(self.q_proj, self.num_heads, keys[0]), context.cos, context.sin)
        k = rotate(heads(self.k_proj, self.num_kv_heads, keys[1]), context.cos, context.sin)
        v = heads(self.v_proj, self.num_kv_heads, keys[2])
        out = attend(q, k, v).reshape(batch, time, -1)
        return self.o_proj(out, context.adapters, keys[3]), (k, v)


class Mlp(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear]):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = make_linear("mlp.gate_proj", d, f, ("embed", "mlp"))
        self.up_proj = make_linear("mlp.up_proj", d, f, ("embed", "mlp"))
        self.down_proj = make_linear("mlp.down_proj", f, d, ("mlp", "embed"))

    def __call__(self, x, context: _LayerContext, keys: list[Any]):
        gate = jax.nn.silu(self.gate_proj(x, context.adapters, keys[0]))
        up = self.up_proj(x, context.adapters, keys[1])
        return self.down_proj(gate * up, context.adapters, keys[2])


class Block(nnx.Module):
    """One decoder layer with pre-norms; made stacked, applied one layer at a time."""

    def __init__(self, config: ModelConfig, make_linear: Callable[..., Linear], param_dtype: Any):
        layers, size, eps = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
        self.attn_norm = RMSNorm(layers, size, eps, param_dtype)
        self.attn = Attention(config, make_linear)
        self.mlp_norm = RMSNorm(layers, size, eps, param_dtype)
        self.mlp = Mlp(config, make_linear)

    def __call__(self, x, context: _LayerContext, dropout_key, attend):
        keys: list[Any] = [None] * len(LINEARS)
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, len(LINEARS)))
        x = sharding.constrain(x, "batch", "time", "hidden")
        attended, kv = self.attn(self.attn_norm(x), context, keys[:4], attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), context, keys[4:]), kv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, in the compute dtype.

    A prompt is kept once for all samples of its group: decoding reads it as one matrix for the
    whole group, and memory grows with what was generated, not with prompts times samples.
    """

    prompt_k: jax.Array  # [layers, prompts, kv_heads, prompt columns, head_dim]
    prompt_v: jax.Array  # same
    prompt_mask: jax.Array  # bool [prompts, prompt columns]; False on padding
    k: jax.Array  # [layers, rows, kv_heads, columns, head_dim]; a column per generated token
    v: jax.Array  # same


def attend_cached(
    q: jax.Array, layer: KVCache, k: jax.Array, v: jax.Array, column: jax.Array
) -> jax.Array:
    """Attention of one new token a row to its prompt and to the tokens generated so far.

    Written as two products, prompt and generated, under one softmax: a generic attention call
    would need the prompt's keys repeated for every sample.

    Args:
      q: [rows, heads, head_dim].
      layer: one layer's cache, without the leading axis; the new token is not in it yet.
      k: [rows, kv_heads, head_dim], the new token's key.
      v: same, its value.
      column: int32 scalar; the new token's column.

    Returns:
      [rows, heads, head_dim].
    """
    rows, num_heads, head_dim = q.shape
    prompts, kv_heads, _, _ = layer.prompt_k.shape
    start = (0, 0, column, 0)
    keys = jax.lax.dynamic_update_slice(layer.k, k[:, :, None], start)
    values = jax.lax.dynamic_update_slice(layer.v, v[:, :, None], start)
    q = q.reshape(prompts, rows // prompts, kv_heads, num_heads // kv_heads, head_dim)
    to_prompt = jnp.einsum(
        "pskqh,pkch->pskqc", q, layer.prompt_k, preferred_element_type=jnp.float32
    )
    to_prompt = jnp.where(layer.prompt_mask[:, None, None, None, :], to_prompt, -jnp.inf)
    by_row = (prompts, rows // prompts, *keys.shape[1:])
    to_own = jnp.einsum(
        "pskqh,pskch->pskqc", q, keys.reshape(by_row), preferred_element_type=jnp.float32
    )
    to_own = jnp.where(jnp.arange(keys.shape[2]) <= column, to_own, -jnp.inf)
    scores = jnp.concatenate([to_prompt, to_own], -1) * head_dim**-0.5
    weights = jax.nn.softmax(scores, -1).astype(q.dtype)
    on_prompt, on_own = jnp.split(weights, [to_prompt.shape[-1]], -1)
    out = jnp.einsum("pskqc,pkch->pskqh", on_prompt, layer.prompt_v)
    out = out + jnp.einsum("pskqc,pskch->pskqh", on_own, values.reshape(by_row))
    return out.reshape(rows, num_heads, head_dim)


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
        adapted = () if lora is None else adapted_names(lora, LINEARS)

        def make_linear(name: str, in_features: int, out_features: int, axes: tuple[str, str]):
            own = lora if name in adapted else None
            return Linear(
                config.num_hidden_layers, in_features, out_features, axes, param_dtype, own
            )

        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.embed = nnx.Param(
            jnp.zeros((config.vocab_size, config.hidden_size), param_dtype),
            axes=("vocab", "hidden"),
        )
        self.layers = Block(config, make_linear, param_dtype)
        self.norm = RMSNorm(None, config.hidden_size, config.rms_norm_eps, param_dtype)
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
        return project(hidden, self.head_kernel())

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
            weights, (prompt_k, prompt_v, own_k, own_v) = inputs
            past = KVCache(prompt_k, prompt_v, cache.prompt_mask, own_k, own_v)

            def attend(q, k, v):
                return attend_cached(q[:, 0], past, k[:, 0], v[:, 0], column)[:, None]

            return nnx.merge(graphdef, weights)(x, context, None, attend)

        stacked = (cache.prompt_k, cache.prompt_v, cache.k, cache.v)
        x, (k, v) = jax.lax.scan(layer, x, (state, stacked))
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
        return sharding.constrain(x, "batch", "time", "hidden")

    def _context(self, positions, adapters) -> _LayerContext:
        angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(
            self.config.inverse_frequencies()
        ).reshape(1, 1, 1, -1)
        return _LayerContext(jnp.cos(angles), jnp.sin(angles), adapters)

    def _forward(self, tokens, positions, segment_ids, adapters, dropout_key, keep_kv):
        x = self._embed(tokens)
        mask = causal_mask(segment_ids)
        context = self._context(positions, adapters)
        graphdef, state = nnx.split(self.layers)

        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, mask=mask)

        def layer(x, inputs):
            weights, key = inputs
            x, kv = nnx.merge(graphdef, weights)(x, context, key, attend)
            return x, kv if keep_kv else None

        if self.remat == "layer":
            layer = jax.checkpoint(layer, prevent_cse=False)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_hidden_layers)
        x, kept = jax.lax.scan(layer, x, (state, keys))
        return self.norm(x), kept


def project(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden] under kernel [hidden, vocab].

    On a mesh every chip multiplies all tokens of its replica by its share of the vocabulary.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    tokens = sharding.constrain(tokens, "replica", "hidden")
    kernel = sharding.constrain(kernel.astype(hidden.dtype), "hidden", "vocab")
    logits = jnp.matmul(tokens, kernel, preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits, "replica", "vocab")
    return logits.reshape(*hidden.shape[:-1], -1)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """bool [batch, 1, time, time]: may query i see key j?  Same segment and j <= i.

    Padding (segment 0) sees itself only, so that no softmax is over nothing.
    """
    time = segment_ids.shape[1]
    rows, columns = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = (segment_ids > 0)[:, :, None]
    allowed = jnp.where(real, same & (columns <= rows)[None], (columns == rows)[None])
    return allowed[:, None]


@dataclasses.dataclass(frozen=True)
class Student:
    """The student as values: what is static, what is trained, what is frozen."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    lora: nnx.State  # float32 leaves
    base: nnx.State  # leaves of the configured param dtype


def merge(graphdef: nnx.GraphDef, lora: nnx.State, base: nnx.State) -> Decoder:
    """The module again, inside or outside jit."""
    return nnx.merge(graphdef, lora, base)


def abstract_student(
    config: ModelConfig, student: StudentConfig, lora: LoraConfig | None
) -> Student:
    """A ``Student`` of ``jax.ShapeDtypeStruct`` leaves: shapes and logical axes, no memory."""
    module = nnx.eval_shape(
        lambda: Decoder(
            config,
            lora,
            jnp.dtype(student.param_dtype),
            jnp.dtype(student.compute_dtype),
            student.remat,
        )
    )
    graphdef, *states = nnx.split(module, nnx.LoRAParam, nnx.Param)
    return Student(config, graphdef, *states)


def random_base(abstract: nnx.State, seed: int, mesh: Mesh | None = None) -> nnx.State:
    """Random frozen weights: normal with deviation 0.02, norms at one.  For tests and plans."""
    root = jax.random.key(seed)
    flat = sorted(abstract.flat_state(), key=lambda item: item[0])

    def draw() -> nnx.State:
        leaves = {}
        for index, (path, variable) in enumerate(flat):
            like = variable.get_raw_value()
            if path[-1] == "weight":
                value = jnp.ones(like.shape, like.dtype)
            else:
                key = jax.random.fold_in(root, index)
                value = (0.02 * jax.random.normal(key, like.shape)).astype(like.dtype)
            leaves[path] = variable.replace(value)
        return nnx.State.from_flat_path(leaves)

    out_shardings = None if mesh is None else sharding.state_shardings(mesh, abstract)
    return jax.jit(draw, out_shardings=out_shardings)()
