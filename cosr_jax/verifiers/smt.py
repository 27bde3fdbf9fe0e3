"""Shows goals with z3, inside a worker process: importing this module imports z3.

The budget is z3's own count of work, which is the same on every run, so that a busy machine does
not change a verdict; the wall clock is the caller's last resort.  Whatever the budget, nothing but
"valid" passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

_MEMORY_MB = 384

# Without the extra this module can be looked at, but not used: ProofJudge.start says so first.
with contextlib.suppress(ModuleNotFoundError):
    import z3

    z3.set_param("memory_max_size", _MEMORY_MB)


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """Decides each goal of a case.

    Args:
      case: {"script": declarations, definitions and assumptions as SMT-LIB text, "goals": terms,
        "budget": z3's rlimit for all goals together}.

    Returns:
      {"goals": [{"status": "valid" | "refuted" | "unknown", "detail": str}]}; the detail of a
      refutation is a counter-example.

    Raises:
      ValueError: the assumptions contradict each other, so that they would imply anything.
      MemoryError: z3 used up its memory.
      z3.Z3Exception: z3 cannot read the script, or broke.
    """
    budget = case["budget"]
    decided = []
    try:
        if _solver(case["script"], budget).check() == z3.unsat:
            raise ValueError("the assumptions of the task contradict each other")
        for goal in case["goals"]:
            result, spent = _decide(case["script"], goal, budget)
            budget = max(1, budget - spent)  # 0 would mean no limit
            decided.append(result)
        return {"goals": decided}
    except z3.Z3Exception as error:
        if "memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


def _decide(script: str, goal: str, budget: int) -> tuple[dict[str, str], int]:
    """What became of a goal, and what it cost."""
    solver = _solver(f"{script}\n(assert (not {goal}))", budget)
    result = solver.check()
    statistics = solver.statistics()
    keys = statistics.keys()  # no work, no entry
    spent = statistics.get_key_value("rlimit count") if "rlimit count" in keys else 0
    if result == z3.unsat:
        return {"status": "valid", "detail": ""}, spent
    if result == z3.sat:
        return {"status": "refuted", "detail": _counter_example(solver.model())}, spent
    reason = solver.reason_unknown()
    if "memory" in reason:
        raise MemoryError(reason)
    return {"status": "unknown", "detail": reason}, spent


def _solver(script: str, budget: int) -> z3.Solver:
    # A context of its own: terms of earlier cases must not change how this one goes.
    solver = z3.Solver(ctx=z3.Context())
    solver.set("rlimit", budget)
    solver.from_string(script)
    return solver


def _counter_example(model: z3.ModelRef) -> str:
    values = {
        str(name)[2:]: str(model[name]) for name in model.decls() if str(name).startswith("v.")
    }
    return ", ".join(f"{name} = {values[name]}" for name in sorted(values)) or "always"
