"""The softmax over a vocabulary as a stream: its parts come, are summed up, and go.

For a token's hidden state h and the vocabulary's vectors k, a log-probability is logit_target -
log sum exp(logits), and its gradient is one vector, k_target minus the k weighted by the softmax.
Both sums are those of attention, with h for the query and k for keys and values: so they are
gathered as FlashAttention does (arXiv:2205.14135, section 3.1), a slice of the vocabulary at a
time under a running maximum, and no array is larger than tokens x slice.  Two products a slice is
all that value and gradient together need.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cosr_jax import sharding
from cosr_jax.student.stacks import sliceable, sliced

#: Entries of the vocabulary whose logits exist at once (on each chip that holds a share): products
#: with fewer are slow, and more leave a CPU's cache.
SLICE = 2048
_LOWEST = -1e30  # finite: the difference of two of them is a number


def softmax_stream(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    temperature: float,
    softcap: float = 0.0,
    *,
    with_pull: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probabilities of targets, the softmax's entropies, and the first ones' gradients.

    On a mesh every chip streams its own share of the vocabulary past all tokens of its replica.

    Args:
      hidden: [tokens, hidden].
      kernel: [hidden, vocab].
      targets: int32 [tokens].
      temperature: positive.
      softcap: logits become softcap * tanh(logits / softcap) before the temperature; 0.0: not.
      with_pull: whether the gradients are wanted.

    Returns:
      float32 [tokens] each, in nats; and the gradient of each log-probability with respect to its
      hidden state, float32 [tokens, hidden], or None.
    """
    tokens, width = hidden.shape
    vocab, shards = kernel.shape[1], vocabulary_shards()
    share = vocab // shards
    slices = math.ceil(share / SLICE)
    size = math.ceil(share / slices)
    hidden = sharding.constrain(hidden, "replica", "hidden")
    targets = sharding.constrain(targets, "replica")
    vectors = sharding.constrain(kernel.T.astype(hidden.dtype), "vocab", "hidden")
    chosen = sharding.constrain(jnp.take(vectors, targets, axis=0), "replica", "hidden")
    vectors = sharding.constrain(vectors.reshape(shards, share, width), "vocab", None, "hidden")
    vectors = sliceable(vectors)
    first = jnp.arange(shards, dtype=jnp.int32)[:, None] * share
    # Two columns, of which one is read: for a product with one a CPU compiles a program.
    ones = jnp.ones((size, 2), jnp.float32)

    def capped(logits: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """Logits as the softmax sees them, and their slope (times the temperature)."""
        if not softcap:
            return logits / temperature, 1.0
        bent = jnp.tanh(logits / softcap)
        return softcap * bent / temperature, 1 - bent**2

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, moment, pull = sums
        start = jnp.minimum(i * size, share - size)  # the last slice overlaps the one before it
        part = sliced(jax.lax.dynamic_slice_in_dim(vectors, start, size, axis=1))
        # Tokens first: an einsum puts the matrix first that has more axes, and a transposed matrix
        # of logits is what a CPU reads slowest.
        logits = jax.lax.dot_general(
            hidden, part, (((1,), (2,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits, slope = capped(sharding.constrain(logits, "replica", "vocab", None))
        columns = first + start + jnp.arange(size)[None]
        # The target stays out, and is added at the end: where it takes nearly all, what is left
        # would otherwise be the difference of two large numbers.
        counts = (columns[None] != targets[:, None, None]) & (columns >= first + i * size)[None]
        logits = jnp.where(counts, logits, _LOWEST)
        higher = jnp.maximum(top, logits.max(-1))
        weights = jnp.exp(logits - higher[..., None])
        fade = jnp.exp(top - higher)
        # Sums as products: these run on all cores, where a reduction does not always.
        total = total * fade + (weights @ ones)[..., 0]
        moment = moment * fade + ((weights * logits) @ ones)[..., 0]
        if with_pull:
            steep = (weights * slope).astype(hidden.dtype)
            more = jax.lax.dot_general(
                steep, part, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
            )
            pull = pull * fade[..., None] + more.swapaxes(0, 1)
        return higher, total, moment, pull

    def zeros(*shape: int) -> jax.Array:
        empty = jnp.zeros((tokens, shards, *shape), jnp.float32)
        return sharding.constrain(empty, "replica", "vocab", *[None] * len(shape))

    start = (zeros() + _LOWEST, zeros(), zeros(), zeros(width if with_pull else 0))
    top, total, moment, pull = jax.lax.fori_loop(0, slices, add, start)

    target, slope = capped(_product("th,th->t", hidden, chosen))
    highest = jnp.maximum(top.max(1), target)
    fade = jnp.exp(top - highest[:, None])
    others, mine = (total * fade).sum(1), jnp.exp(target - highest)
    whole = others + mine
    lse = highest + jnp.log(whole)
    entropy = lse - ((moment * fade).sum(1) + mine * target) / whole
    if not with_pull:
        return target - lse, entropy, None
    # k_target (1 - softmax_target) - the others, each times its slope.
    up = chosen.astype(jnp.float32) * (slope * others / whole)[:, None]
    down = (pull * fade[..., None]).sum(1) / whole[:, None]
    return target - lse, entropy, (up - down) / temperature


def vocabulary_shards() -> int:
    """Shares that the vocabulary is cut into on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.RULES["vocab"])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
