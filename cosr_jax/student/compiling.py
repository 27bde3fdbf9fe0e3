"""How the student's programs are compiled."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh

_LEVEL = "xla_backend_optimization_level"


def compiler_options(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """What ``jax.jit`` tells the compiler about a program of the student; None: nothing.

    On a CPU, LLVM's first level of optimisation instead of its third: a program is there in two
    thirds of the time, and runs as fast, since most of its work is in products, which are a
    library's.  A level in ``XLA_FLAGS`` is the user's choice and stays.

    Args:
      mesh: that the program is for; None: the default device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", ""):
        return None
    return {_LEVEL: 1}
