"""The killable process that compares answers with sympy: ``python -m cosr_jax.verifiers.worker``.

Protocol, one JSON object per line.  The worker says ``{"ready": true, "cpu_s"}`` once sympy is
imported, so that the import is on nobody's clock.  Each ``{"id", "given", "gold"}`` gets one of

    {"id", "agree": bool, "cpu_s": float}      cpu_s: CPU seconds of this process so far
    {"id", "limit": "memory_limit"}            the comparison ran out of memory; the worker ends
    {"id", "error": str}                       the verifier's own trouble, e.g. an unreadable gold

Answers go to a private copy of stdout, and stdout itself to stderr: whatever a library prints
cannot break the protocol.  The worker ends with its input, in the middle of a comparison too, so
none outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
from typing import Any, TextIO

_MEMORY_BYTES = 2 << 30


def main() -> None:
    """Serves cases until the end of input."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    # Only here: the parent, which imports this package too, never pays for sympy.
    from cosr_jax.verifiers import symbolic

    _send(channel, {"ready": True, "cpu_s": time.process_time()})
    while True:
        case = json.loads(lines.get())
        answer = _judge(symbolic, case["given"], case["gold"])
        _send(channel, {"id": case["id"], **answer})
        if "limit" in answer:
            os._exit(1)


def _read(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # at once, even if a comparison is running


def _judge(symbolic: Any, given: str, gold: str) -> dict[str, Any]:
    from cosr_jax.verifiers.math_answer import answers_agree

    try:
        agree = answers_agree(given, gold, symbolic.symbolically_equal)
    except symbolic.Unreadable as error:
        return {"error": f"gold answer: {error}"}
    except MemoryError:
        return {"limit": "memory_limit"}
    except Exception as error:
        # sympy gives up on some inputs with all kinds of exceptions: equality was not shown.
        return {"agree": False, "cpu_s": time.process_time(), "detail": repr(error)[:200]}
    return {"agree": bool(agree), "cpu_s": time.process_time()}


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
