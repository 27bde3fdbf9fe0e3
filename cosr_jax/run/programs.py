"""Compiled programs: kept from run to run, and compiled once for each shape within one."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cosr_jax.student.sources import cache_dir

_log = logging.getLogger(__name__)


def keep_programs() -> Path | None:
    """Lets this and later runs take compiled programs from the user's cache.

    A cache that the user has chosen (``JAX_COMPILATION_CACHE_DIR``) or switched off
    (``JAX_ENABLE_COMPILATION_CACHE=false``) stays so.

    Returns:
      The folder, None if there is none.
    """
    settings: Any = jax.config  # whose attributes no type knows
    if not settings.jax_enable_compilation_cache:
        return None
    if settings.jax_compilation_cache_dir is None:
        # Programs for one CPU need not run on another that shares the home directory.
        folder = cache_dir() / f"programs-{_cpu()}"
        settings.update("jax_compilation_cache_dir", str(folder))
    return Path(settings.jax_compilation_cache_dir)


@contextlib.contextmanager
def heap_set_aside() -> Iterator[None]:
    """Keeps what exists now (libraries, student, tokenizer) out of garbage collections inside.

    Tracing a program makes so many objects that the collector runs all the time, and looks at all
    others each time: half of the time that tracing a step takes.  It runs more seldom, too.
    """
    gc.collect()
    gc.freeze()
    often, *rest = gc.get_threshold()
    gc.set_threshold(max(often, 10_000), *rest)
    try:
        yield
    finally:
        gc.set_threshold(often, *rest)
        gc.unfreeze()


class CountedProgram:
    """A jitted function that counts its compilations, and warns of one that should not have been.

    Each shape of the arguments is compiled once.  Another compilation for a shape that was there
    before costs its seconds at every step, e.g. because an argument's type or placement changes.

    Attributes:
      compilations: so far.
    """

    def __init__(self, name: str, function: Any):
        self.compilations = 0
        self._name = name
        self._function = function
        self._known: set[Any] = set()

    def __call__(self, *args: Any) -> Any:
        """The function's value; the shapes of all arguments' arrays say what is new."""
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, tuple(jax.numpy.shape(leaf) for leaf in leaves))
        before = self._function._cache_size()
        result = self._function(*args)
        if (more := self._function._cache_size() - before) > 0:
            self.compilations += more
            if shapes in self._known:
                _log.warning(
                    "the %s program was compiled again for a shape that it knew (%d compilations, "
                    "%d shapes): please report this",
                    self._name,
                    self.compilations,
                    len(self._known),
                )
        self._known.add(shapes)
        return result


def _cpu() -> str:
    cpuinfo, features = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith("flags")), features)
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]
