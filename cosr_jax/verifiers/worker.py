"""A killable process that answers requests: ``python -m cosr_jax.verifiers.worker MODULE:NAME``.

The named function takes a request's case, a dict, and returns a dict; both travel as JSON.
Importing its module is the warm-up.  Protocol, one JSON object per line.  The worker says
``{"ready": true, "cpu_s", "size_mb"}`` once warm, so that the import is on nobody's clock.  Each
``{"id", "memory_mb", "case"}`` gets one of

    {"id", "result": {...}, "cpu_s", "size_mb"}   CPU seconds and MiB of address space so far
    {"id", "limit": "memory_limit"}               more memory was needed; the worker ends
    {"id", "error": str, "cpu_s", "size_mb"}      the verifier's own trouble

Answers go to a private copy of stdout, and stdout itself to stderr: whatever a library prints
cannot break the protocol.  The worker ends with its input, in the middle of a request too, so none
outlives the process that started it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class Unjudgeable(Exception):
    """Raised by a worker's function when no answer can be blamed, e.g. for an unreadable gold."""


def main(target: str) -> None:
    """Serves requests until the end of input.

    Args:
      target: "package.module:function".
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    _send(channel, {"ready": True, **_usage()})
    while True:
        request = json.loads(lines.get())
        # On top of what earlier requests have left in caches, which is not this one's doing.
        _limit_memory(size_mb() + request["memory_mb"])
        answer = _answer(function, request["case"])
        _send(channel, {"id": request["id"], **answer})
        if "limit" in answer:
            os._exit(1)


def size_mb() -> int:
    """The process's address space in MiB, which is what RLIMIT_AS limits; 0 where it is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize() >> 20


def _limit_memory(mb: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mb << 20
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # at once, even if a request is being answered


def _answer(function: Callable[[dict[str, Any]], dict[str, Any]], case: Any) -> dict[str, Any]:
    try:
        return {"result": function(case), **_usage()}
    except MemoryError:
        return {"limit": "memory_limit"}
    except Unjudgeable as error:
        return {"error": str(error), **_usage()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000], **_usage()}


def _usage() -> dict[str, float]:
    return {"cpu_s": time.process_time(), "size_mb": size_mb()}


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    # Under its real name: as __main__ its Unjudgeable would not be the one that functions raise.
    from cosr_jax.verifiers import worker

    worker.main(sys.argv[1])
