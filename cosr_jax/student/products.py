"""Products with sums in float32, whatever dtype is multiplied.

On a CPU that is also what finds the fast product of bfloat16: asked for a bfloat16 result, XLA
takes twice as long.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y [..., n, k], summed in float32 and rounded once to the dtype of x.

    Args:
      x: [..., n, m].
      y: [..., m, k].
    """
    return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def product_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y^T [..., n, k], summed and rounded as by ``product``.

    One contraction, not a transpose and a product: from these XLA's CPU backend makes a float32
    product, at half the speed of bfloat16.

    Args:
      x: [..., n, m].
      y: [..., k, m].
    """
    last, rows = x.ndim - 1, tuple(range(x.ndim - 2))
    out = jax.lax.dot_general(
        x, y, (((last,), (last,)), (rows, rows)), preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype)


@jax.custom_vjp
def frozen_product(x: jax.Array, kernel: Any) -> jax.Array:
    """x W [tokens, out] for a frozen W, which receives no gradient.

    Args:
      x: [tokens, in].
      kernel: W [in, out], an array or packed; what is packed is kept so for the backward pass.
    """
    return product(x, kernel.astype(x.dtype))


def _forward(x, kernel):
    return frozen_product(x, kernel), kernel


def _backward(kernel, pull):
    return product_transposed(pull, kernel.astype(pull.dtype)), None


frozen_product.defvjp(_forward, _backward)
