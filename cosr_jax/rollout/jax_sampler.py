"""The embedded rollout engine: jitted prefill and decode on the trainer's own weights.

A prompt is prefilled once for all its samples.  Rows decode in slots; one that has ended gives its
slot to the next that waits, so that a few long completions do not hold up the others.  The same
call serves training and evaluation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cosr_jax.config import RolloutConfig
from cosr_jax.protocols import ChatTokenizer
from cosr_jax.rollout import slots
from cosr_jax.rollout.prompts import PromptStore
from cosr_jax.rollout.sampling import seed_key
from cosr_jax.rollout.schedule import Layout, Schedule
from cosr_jax.student.compiling import compiler_options
from cosr_jax.student.decoding_copy import unstack
from cosr_jax.student.model import Student, merge
from cosr_jax.student.quantised import is_packed
from cosr_jax.types import Completion, Finished, SamplingParams, UserError

#: Slots are refilled, and completions handed over, when this share of them has ended: less often,
#: and slots stand idle; more often, and the device waits for the host.
_REFILL_SHARE = 1 / 8
#: Bytes of base weights up to which a CPU decodes from a copy: beyond, memory is dearer than time,
#: and a copy's program grows with the number of layers.
_MOST_COPIED = 4 * 2**30


class JaxSampler:
    """Samples the student; implements ``protocols.RolloutEngine``.

    Args:
      student: whose base weights and first adapters are used.
      tokenizer: supplies padding, the stop tokens and decoding.
      config: row and prompt limits, and how decoding is done.
      mesh: the step's mesh; None runs on one device.
    """

    def __init__(
        self,
        student: Student,
        tokenizer: ChatTokenizer,
        config: RolloutConfig,
        mesh: Mesh | None = None,
    ):
        self._base, self._model = student.base, student.config
        self._tokenizer, self._config = tokenizer, config
        self._mesh = mesh
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        # Only a token of the student's vocabulary can be drawn, whatever the tokenizer knows.
        vocab = np.arange(student.config.vocab_size)
        self._stops = jnp.asarray(np.isin(vocab, tokenizer.stop_ids))
        model = merge(student.graphdef, student.lora, student.base)
        self._dtype = model.compute_dtype
        is_one_cpu = mesh is None and jax.default_backend() == "cpu"
        is_small = sum(leaf.nbytes for leaf in jax.tree.leaves(student.base)) <= _MOST_COPIED
        can_copy = is_small and student.config.moe is None and not is_packed(student.base)
        self._unstacked = config.decoding_copy and is_one_cpu and can_copy
        # In bfloat16 small adapters would be rounded away from the sum.
        self._merged = (
            self._unstacked and self._dtype == np.float32 and model.embed[...].dtype == np.float32
        )
        graphdef = student.graphdef
        self._empty = jax.jit(slots.empty_slots, static_argnums=tuple(range(7)))
        self._unstack = functools.partial(unstack, graphdef)
        options = compiler_options(mesh)
        self._prefill = jax.jit(
            functools.partial(slots.prefill, graphdef), compiler_options=options
        )
        self._decode = jax.jit(
            functools.partial(slots.decode, graphdef),
            static_argnames=("adapters", "greedy", "truncated"),
            donate_argnums=2,
            compiler_options=options,
        )
        self._lora = student.lora
        self._copy: nnx.State | None = None  # of the base weights, unstacked

    def set_adapters(self, lora: nnx.State) -> None:
        """Samples from these adapters from now on (by reference: call it after every update)."""
        self._lora = lora
        if self._merged:
            self._copy = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
        on_finished: Callable[[Finished], bool] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Draws ``num_generations`` completions of each prompt.

        A row's random numbers depend on ``seed`` and its place in the call alone, not on when or
        beside whom it is decoded.

        Args:
          prompts: token ids of each prompt.
          num_generations: samples of each prompt.
          sampling: distribution and length limit; see ``Completion`` for the log-probabilities.
          seed: of every draw.
          on_finished: is told of every completion soon after its end, while the device decodes on,
            in whatever order they end.  Where it answers True, the other samples of the prompt
            are cut off, with the finish_reason "cancelled".

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
        if not prompts:
            return []
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            rows = self._run(prompts, num_generations, sampling, seed, on_finished)
        return [
            tuple(rows[prompt * num_generations + sample] for sample in range(num_generations))
            for prompt in range(len(prompts))
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        sampling: SamplingParams,
        seed: int,
        on_finished: Callable[[Finished], bool] | None,
    ) -> dict[int, Completion]:
        """Every row's completion."""
        config, columns = self._config, sampling.max_new_tokens
        layout = Layout.of(len(prompts), samples, config.max_rows, self._shards)
        schedule = Schedule(len(prompts), samples, layout.slots, config.refill)
        store = PromptStore(
            prompts,
            samples,
            layout,
            config.max_prompt_tokens,
            self._shards,
            self._tokenizer.pad_id,
            functools.partial(self._prefill, self._lora, self._base),
        )
        step = functools.partial(
            self._decode,
            self._lora,
            self._decoding_base(),
            drawing=slots.Drawing(
                seed_key(seed),
                self._stops,
                np.float32(sampling.temperature),
                np.float32(sampling.top_p),
                np.int32(sampling.top_k),
            ),
            adapters=not self._merged,
            greedy=sampling.temperature == 0,
            truncated=sampling.top_p < 1 or sampling.top_k > 0,
        )
        shape = (layout.slots, layout.places, store.width, columns)
        dtype = self._dtype if config.cache_dtype == "compute" else jnp.dtype(config.cache_dtype)
        state = self._empty_slots(self._model, *shape, dtype, self._unstacked)
        done: dict[int, Completion] = {}
        ended: list[int] = []  # rows that ``on_finished`` has not been told of yet
        cancelled: set[int] = set()  # prompts

        def tell() -> None:
            for row in ended:
                prompt, sample = divmod(row, samples)
                finished = Finished(prompt, sample, done[row])
                if on_finished is not None and on_finished(finished) and prompt not in cancelled:
                    cancelled.add(prompt)
                    for waiting in schedule.withdraw(prompt):
                        done[waiting] = Completion((), (), "", "cancelled")

        while not schedule.is_done:
            entering = schedule.enter()
            for ready, admission in store.admissions(entering):
                state = slots.admit(state, ready, admission)
            wanted = np.zeros(layout.slots, bool)
            for slot, row in schedule.running():
                wanted[slot] = row // samples not in cancelled
            must_report = on_finished is not None or (schedule.is_waiting and config.refill)
            enough = max(1, int(layout.slots * _REFILL_SHARE)) if must_report else layout.slots
            state, report = step(state, turn=store.turn(entering, wanted, enough))
            tell()  # the device decodes meanwhile
            report = jax.device_get(report)
            ended = []
            for slot, row in schedule.running():
                if not report.running[slot]:
                    schedule.leave(slot)
                    done[row] = self._completion(report, slot, columns)
                    ended.append(row)
        tell()
        return done

    def _empty_slots(self, *shape: Any) -> slots.Slots:
        if self._mesh is not None:
            return self._empty(*shape)
        # Put where the weights are, as decoding leaves them: else it would be compiled once more
        # for the second turn.
        where = jax.tree.leaves(self._base)[0].sharding
        if not self._unstacked:
            return jax.device_put(self._empty(*shape), where)
        # Of one array a layer a program would take its time to compile.  Here positions are zero as
        # well: a row's are written when it begins.
        like = jax.eval_shape(lambda: slots.empty_slots(*shape))
        return jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), where, may_alias=False), like
        )

    def _decoding_base(self) -> nnx.State:
        if not self._unstacked:
            return self._base
        if self._copy is None:
            self._copy = self._unstack(self._lora, self._base, merged=self._merged)
        return self._copy

    def _completion(self, report: slots.Report, slot: int, columns: int) -> Completion:
        length = int(report.drawn[slot])
        ids = tuple(report.tokens[slot, :length].tolist())
        was_cut = length < columns and not report.stopped[slot]
        return Completion(
            token_ids=ids,
            logprobs=tuple(report.logprobs[slot, :length].tolist()),
            text=self._tokenizer.decode(ids),
            finish_reason="cancelled" if was_cut else "stop" if report.stopped[slot] else "length",
        )
