"""How the student's programs are compiled."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh


def compiler_options(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """What ``jax.jit`` tells the compiler about a program of the student; None: nothing.

    On a CPU, LLVM's first level of optimisation instead of its third: a program is there in two
    thirds of the time, and runs as fast, since most of its work is in products, which are a
    library's.

    Args:
      mesh: that the program is for; None: the default device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else None
