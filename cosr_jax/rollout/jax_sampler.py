"""The embedded rollout engine: jitted prefill and decode on the trainer's own weights.

A prompt is prefilled once and its cache repeated for the samples of its group; then one compiled
loop draws tokens until every row has stopped.  The same call serves training and evaluation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax import sharding
from cosr_jax.buckets import bucket_length, bucket_rows
from cosr_jax.config import RolloutConfig
from cosr_jax.protocols import ChatTokenizer
from cosr_jax.rollout.sampling import draw_token
from cosr_jax.student.model import Student, merge
from cosr_jax.types import Completion, SamplingParams, UserError


class JaxSampler:
    """Samples the student; implements ``protocols.RolloutEngine``.

    Args:
      student: whose base weights and first adapters are used; nothing is copied.
      tokenizer: supplies padding, the stop tokens and decoding.
      config: row and prompt limits.
      mesh: the step's mesh; None runs on one device.
    """

    def __init__(
        self,
        student: Student,
        tokenizer: ChatTokenizer,
        config: RolloutConfig,
        mesh: Mesh | None = None,
    ):
        self._base = student.base
        self._lora = student.lora
        self._tokenizer = tokenizer
        self._config = config
        self._mesh = mesh
        self._row_shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._program = jax.jit(
            functools.partial(_generate, student.graphdef),
            static_argnames=("num_generations", "max_new_tokens", "greedy", "truncated"),
        )
        self._stop_ids = jnp.asarray(tokenizer.stop_ids, jnp.int32)

    def set_adapters(self, lora: nnx.State) -> None:
        """Samples from these adapters from now on (by reference: call it after every update)."""
        self._lora = lora

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
    ) -> list[tuple[Completion, ...]]:
        """Draws ``num_generations`` completions of each prompt.

        A row's random numbers depend on ``seed`` and its place in the call alone, not on how the
        call is cut into batches.

        Args:
          prompts: token ids of each prompt.
          num_generations: samples of each prompt.
          sampling: distribution and length limit; see ``Completion`` for the log-probabilities.
          seed: of every draw.

        Returns:
          For each prompt, in order, its completions.

        Raises:
          UserError: a prompt is empty or longer than ``config.rollout.max_prompt_tokens``.
        """
        for prompt in prompts:
            if not 0 < len(prompt) <= self._config.max_prompt_tokens:
                raise UserError(
                    f"config.rollout.max_prompt_tokens: {self._config.max_prompt_tokens} does not "
                    f"admit a prompt of {len(prompt)} tokens",
                    "raise it, or shorten the task's text",
                )
        per_call = self._max_prompts(num_generations)
        groups: list[tuple[Completion, ...]] = []
        for start in range(0, len(prompts), per_call):
            groups += self._generate_batch(
                prompts[start : start + per_call], num_generations, sampling, seed, start
            )
        return groups

    def _max_prompts(self, num_generations: int) -> int:
        """Prompts decoded at once; at least one, since a group is never split."""
        return max(1, self._config.max_rows // num_generations)

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
        first: int,
    ) -> list[tuple[Completion, ...]]:
        most = self._max_prompts(num_generations)
        count = bucket_rows(len(prompts), most, self._row_shards)
        longest = max(len(prompt) for prompt in prompts)
        width = bucket_length(longest, self._config.max_prompt_tokens)
        tokens = np.full((count, width), self._tokenizer.pad_id, np.int32)
        mask = np.zeros((count, width), bool)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = True
        row_ids = (first + np.arange(count, dtype=np.int32)) * num_generations
        real = np.arange(count) < len(prompts)
        if self._mesh is not None:
            place = sharding.array_sharding(self._mesh, ("batch",), (count,))
            tokens, mask, row_ids, real = jax.device_put((tokens, mask, row_ids, real), place)
        in_mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with in_mesh:
            out, logprobs, lengths, stopped = jax.device_get(
                self._program(
                    self._lora,
                    self._base,
                    tokens,
                    mask,
                    row_ids,
                    real,
                    self._stop_ids,
                    jax.random.key(seed),
                    np.float32(sampling.temperature),
                    np.float32(sampling.top_p),
                    np.int32(sampling.top_k),
                    num_generations=num_generations,
                    max_new_tokens=sampling.max_new_tokens,
                    greedy=sampling.temperature == 0,
                    truncated=sampling.top_p < 1 or sampling.top_k > 0,
                )
            )

        def completion(row: int) -> Completion:
            ids = tuple(out[row, : lengths[row]].tolist())
            return Completion(
                token_ids=ids,
                logprobs=tuple(logprobs[row, : lengths[row]].tolist()),
                text=self._tokenizer.decode(ids),
                finish_reason="stop" if stopped[row] else "length",
            )

        return [
            tuple(completion(group * num_generations + i) for i in range(num_generations))
            for group in range(len(prompts))
        ]


def _generate(
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    base: nnx.State,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    row_ids: jax.Array,
    real: jax.Array,
    stop_ids: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    top_k: jax.Array,
    *,
    num_generations: int,
    max_new_tokens: int,
    greedy: bool,
    truncated: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The compiled program: ``rows = prompts * num_generations``.

    Args:
      graphdef: the student's; static.
      lora: adapters.
      base: frozen weights.
      prompt_tokens: int32 [prompts, width], left-padded.
      prompt_mask: bool [prompts, width].
      row_ids: int32 [prompts]; number of each prompt's first row in the whole call.
      real: bool [prompts]; False for rows that only fill the batch.
      stop_ids: int32 [stops].
      key: typed PRNG key.
      temperature: float32 scalar.
      top_p: float32 scalar.
      top_k: int32 scalar.
      num_generations: static.
      max_new_tokens: static.
      greedy: static.
      truncated: static.

    Returns:
      tokens int32 [rows, max_new_tokens], logprobs float32 [rows, max_new_tokens], lengths int32
      [rows] and stopped bool [rows].
    """
    model = merge(graphdef, lora, base)
    prompt_lengths = prompt_mask.sum(-1)
    positions = jnp.maximum(jnp.cumsum(prompt_mask, -1) - 1, 0)
    hidden, cache = model.prefill(
        prompt_tokens, positions, prompt_mask, num_generations, max_new_tokens
    )

    def per_row(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, num_generations, axis=0)

    lengths_before = per_row(prompt_lengths)
    rows = prompt_tokens.shape[0] * num_generations
    numbers = per_row(row_ids) + jnp.tile(jnp.arange(num_generations), prompt_tokens.shape[0])
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)

    def draw(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        uniforms = jax.vmap(jax.random.uniform)(step_keys)
        return draw_token(
            logits, uniforms, temperature, top_p, top_k, greedy=greedy, truncated=truncated
        )

    def is_stop(token: jax.Array) -> jax.Array:
        return (token[:, None] == stop_ids[None, :]).any(-1)

    token, logprob = draw(per_row(model.logits(hidden[:, -1])), jnp.int32(0))
    tokens = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprob)
    stopped = is_stop(token)
    # Filler rows count as stopped from the start, so that they never keep the loop running.
    running = per_row(real) & ~stopped

    def more(state):
        step, running = state[0], state[1]
        return (step < max_new_tokens) & running.any()

    def advance(state):
        step, running, stopped, lengths, token, tokens, logprobs, cache = state
        position = lengths_before + step - 1
        hidden, cache = model.decode(token, position, cache, step - 1)
        token, logprob = draw(model.logits(hidden), step)
        tokens = tokens.at[:, step].set(jnp.where(running, token, 0))
        logprobs = logprobs.at[:, step].set(jnp.where(running, logprob, 0.0))
        lengths = lengths + running
        ended = running & is_stop(token)
        return (
            step + 1,
            running & ~ended,
            stopped | ended,
            lengths,
            token,
            tokens,
            logprobs,
            cache,
        )

    start = (
        jnp.int32(1),
        running,
        stopped,
        jnp.ones(rows, jnp.int32),
        token,
        tokens,
        logprobs,
        cache,
    )
    _, _, stopped, lengths, _, tokens, logprobs, _ = jax.lax.while_loop(more, advance, start)
    return tokens, logprobs, lengths, stopped
