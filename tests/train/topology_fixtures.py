"""Runs a program that compiles for a TPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def compiled_memory(program: str, *arguments: str) -> dict[str, int]:
    """The bytes that ``program`` prints as JSON.

    In a process of its own: libtpu writes to stderr, and its platform choice outlives a test.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        # Of the tests' flags for XLA, libtpu does not know all, and ends the process.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    print(*arguments, {part: f"{size / 2**30:.2f} GiB" for part, size in memory.items()})
    return memory
