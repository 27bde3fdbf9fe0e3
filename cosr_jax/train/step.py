"""One compiled optimizer step for SFT and GRPO: (state, base, batch, rate) -> (state, metrics)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cosr_jax import sharding
from cosr_jax.config import TrainConfig
from cosr_jax.student.compiling import compiler_options
from cosr_jax.student.model import Student, merge
from cosr_jax.student.routing import load_metrics
from cosr_jax.train.batching import TrainBatch, microbatch_rows
from cosr_jax.train.logprobs import batch_logprobs
from cosr_jax.train.losses import GrpoObjective, LossTerms, SftObjective

Metrics = dict[str, jax.Array]  # float32 scalars


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar: steps taken, skipped ones included
    lora: nnx.State  # float32 leaves
    opt_state: optax.OptState
    nonfinite: jax.Array  # int32 scalar: updates skipped in a row
    nonfinite_total: jax.Array  # int32 scalar: updates skipped since the start


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) for a learning rate of 1, ascending, of gradients that are clipped.

    The step clips by the norm that it reports, and multiplies by minus the learning rate: rate and
    schedule change between rounds, and as arguments they cost no compilation.
    """
    return optax.chain(
        optax.identity(),  # checkpoints name moments by their place, which was behind a clipping
        optax.scale_by_adam(),
        optax.add_decayed_weights(train.weight_decay),
    )


def make_schedule(train: TrainConfig) -> optax.Schedule:
    """step -> factor of the learning rate in [0, 1]; it decays over the run's planned steps."""
    total = max(1, train.max_rounds * train.steps_per_round - train.warmup_steps)
    decay = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, total),
        "linear": optax.linear_schedule(1.0, 0.0, total),
    }[train.schedule]
    if not train.warmup_steps:
        return decay
    # From 1 / (n + 1), so that no step is wasted on a rate of zero.
    first = 1.0 / (train.warmup_steps + 1)
    warmup = optax.linear_schedule(first, 1.0, train.warmup_steps)
    return optax.join_schedules([warmup, decay], [train.warmup_steps])


def init_state(lora: nnx.State, train: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step; takes ownership of ``lora`` (steps donate the state)."""
    optimizer = make_optimizer(train)

    def start(lora: nnx.State) -> TrainState:
        # One array each: donation refuses a buffer that appears twice.
        zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
        return TrainState(zeros[0], lora, optimizer.init(lora), zeros[1], zeros[2])

    out_shardings = None if mesh is None else train_state_shardings(mesh, lora, train)
    return jax.jit(start, out_shardings=out_shardings, donate_argnums=0)(lora)


def train_state_shardings(mesh: Mesh, lora: nnx.State, train: TrainConfig) -> TrainState:
    """A ``TrainState`` of shardings: moments like their adapters, counters on every device."""
    optimizer = make_optimizer(train)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    of_lora: Any = sharding.state_shardings(mesh, lora)
    of_moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, lora),
        of_lora,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, of_lora, of_moments, replicated, replicated)


def make_train_step(
    student: Student,
    objective: SftObjective | GrpoObjective,
    train: TrainConfig,
    mesh: Mesh | None = None,
    dropout_seed: int | None = None,
) -> jax.stages.Wrapped:
    """Compiles ``(state, base, batch, learning_rate) -> (state, metrics)``; only adapters move.

    Microbatches are summed in float32 in a loop of ``batch.num_microbatches`` turns, so a batch
    that is not full costs less without another compilation, and the sums are divided once.  When
    loss or gradient is not finite, adapters and moments stay and the skip is counted.  ``state``
    is donated.  One program for each shape of the batch.

    Args:
      student: its graph definition and logical axes are used, not its values.
      objective: what is minimised.
      train: optimizer, schedule, microbatch and chunk sizes.
      mesh: rows are split over its data and fsdp axes, weights and moments by their logical axes;
        the batch arrives whole on every device.  None: the default device.
      dropout_seed: turns the adapters' dropout on; each step and microbatch draws anew.
    """
    optimizer, schedule = make_optimizer(train), make_schedule(train)

    def loss_terms(lora, base, chunk, key):
        module = merge(student.graphdef, lora, base)
        reference = None
        if objective.needs_reference:
            reference, *_ = batch_logprobs(
                module, chunk, objective.temperature, train.logit_chunk, adapters=False
            )
            reference = jax.lax.stop_gradient(reference)
        logprobs, entropy, load = batch_logprobs(
            module, chunk, objective.temperature, train.logit_chunk, dropout_key=key
        )
        terms = objective(logprobs, entropy, reference, chunk)
        return terms.loss, dataclasses.replace(terms, load=load)

    @jax.jit  # traced once, for its shapes as for its values
    def gradient(state: TrainState, base: nnx.State, batch: TrainBatch, i: jax.Array):
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
            key = jax.random.fold_in(key, i)
        chunk = _microbatches(batch, train, mesh)(i)
        return jax.grad(loss_terms, has_aux=True)(state.lora, base, chunk, key)

    def accumulate(state: TrainState, base: nnx.State, batch: TrainBatch):
        def add(i, total):
            (grads, terms), (more_grads, more) = total, gradient(state, base, batch, i)
            added = jax.tree.map(jnp.add, (grads, terms), (more_grads, more))
            maxima = jax.tree.map(jnp.maximum, terms.maxima, more.maxima)
            return added[0], dataclasses.replace(added[1], maxima=maxima)

        like = jax.eval_shape(gradient, state, base, batch, jnp.int32(0))
        start = jax.tree.map(lambda like: jnp.zeros(like.shape, jnp.float32), like)
        return jax.lax.fori_loop(jnp.int32(0), batch.num_microbatches, add, start)

    def train_step(state, base, batch, learning_rate):
        with _mesh_context(mesh):
            grads, terms = accumulate(state, base, batch)
        divisor = objective.divisor(terms.weight)
        loss = terms.loss / divisor
        grad_norm = optax.global_norm(grads) / divisor
        # One factor divides and clips: what is multiplied is multiplied wherever it is read, while
        # quotients are kept, and each shape of them is a program to compile.
        factor = jnp.minimum(1.0, train.clip_norm / grad_norm) / divisor
        grads = jax.tree.map(lambda g: g * factor, grads)
        rate = learning_rate * schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = jax.tree.map(lambda p, u: p - rate * u, state.lora, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        lora, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (lora, opt_state),
            (state.lora, state.opt_state),
        )
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            state.step + 1,
            lora,
            opt_state,
            (state.nonfinite + 1) * skipped,
            state.nonfinite_total + skipped,
        )
        return new_state, _metrics(terms, loss, grad_norm, rate, new_state)

    options = compiler_options(mesh)
    if mesh is None:
        return jax.jit(train_step, donate_argnames="state", compiler_options=options)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_state = train_state_shardings(mesh, student.lora, train)
    of_base = sharding.state_shardings(mesh, student.base)
    return jax.jit(
        train_step,
        donate_argnames="state",
        in_shardings=(of_state, of_base, replicated, replicated),
        out_shardings=(of_state, replicated),
        compiler_options=options,
    )


def make_logprobs_fn(
    student: Student,
    train: TrainConfig,
    temperature: float,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """Compiles ``(lora, base, batch) -> (logprobs, entropies)``, float32 [rows, completion], nats.

    Values at padding are zero.  The trainer asks it for ``old_logprobs`` before it takes several
    steps on one batch.
    """

    def logprobs(lora, base, batch):
        with _mesh_context(mesh):
            module = merge(student.graphdef, lora, base)
            microbatch = _microbatches(batch, train, mesh)

            def fill(i, outputs):
                chunk = microbatch(i)
                *values, _ = batch_logprobs(module, chunk, temperature, train.logit_chunk)
                start = i * chunk.rows
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(
                        out, jnp.where(chunk.completion_mask, value, 0.0), start, 0
                    )
                    for out, value in zip(outputs, values, strict=True)
                )

            zeros = jnp.zeros(batch.completion_tokens.shape, jnp.float32)
            return jax.lax.fori_loop(0, batch.num_microbatches, fill, (zeros, zeros))

    options = compiler_options(mesh)
    if mesh is None:
        return jax.jit(logprobs, compiler_options=options)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_lora = sharding.state_shardings(mesh, student.lora)
    of_base = sharding.state_shardings(mesh, student.base)
    return jax.jit(
        logprobs,
        in_shardings=(of_lora, of_base, replicated),
        out_shardings=replicated,
        compiler_options=options,
    )


def batch_shards(mesh: Mesh | None) -> int:
    """Pieces that a microbatch's rows are cut into on ``mesh``."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])


def _microbatches(
    batch: TrainBatch, train: TrainConfig, mesh: Mesh | None
) -> Callable[[jax.Array | int], TrainBatch]:
    """Microbatch ``i`` of a batch that every device holds whole: a slice, then each its rows."""
    size = microbatch_rows(batch.rows, train.microbatch_size, batch_shards(mesh))
    if batch.rows % size:
        raise ValueError(
            f"a batch of {batch.rows} rows is not made of microbatches of {size}; see batch_shape"
        )

    def cut(i: jax.Array | int) -> TrainBatch:
        def rows(x: jax.Array) -> jax.Array:
            if not x.ndim:
                return x
            share = size * x.shape[0] // batch.rows  # fewer prompts than rows, where shared
            piece = jax.lax.dynamic_slice_in_dim(x, i * share, share)
            return sharding.constrain(piece, "batch", *[None] * (x.ndim - 1))

        return jax.tree.map(rows, batch)

    return cut


def _mesh_context(mesh: Mesh | None) -> Any:
    """Lets ``sharding.constrain`` see the mesh while the program is traced."""
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    return jax.sharding.use_abstract_mesh(abstract)


def _metrics(
    terms: LossTerms, loss: jax.Array, grad_norm: jax.Array, rate: jax.Array, state: TrainState
) -> Metrics:
    means = {name: value / terms.tokens for name, value in terms.sums.items()}
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(rate, jnp.float32),
        "tokens": terms.tokens,
        "nonfinite": state.nonfinite.astype(jnp.float32),
        "nonfinite_total": state.nonfinite_total.astype(jnp.float32),
        **means,
        **terms.maxima,
        **({} if terms.load is None else load_metrics(terms.load)),
    }
