"""What a maths worker does with a pair of answers.  Imported by worker processes only."""

from __future__ import annotations

from typing import Any

from cosr_jax.verifiers import symbolic
from cosr_jax.verifiers.math_answer import answers_agree
from cosr_jax.verifiers.worker import Unjudgeable


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """``{"given", "gold"}`` to ``{"agree": bool, "detail": str}``.

    Raises:
      Unjudgeable: the gold answer is no expression.
      MemoryError: the comparison needs more memory than it may use.
    """
    try:
        agree = answers_agree(case["given"], case["gold"], symbolic.symbolically_equal)
    except symbolic.Unreadable as error:
        raise Unjudgeable(f"gold answer: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # sympy gives up on some inputs with all kinds of exceptions: equality was not shown.
        return {"agree": False, "detail": repr(error)[:200]}
    return {"agree": bool(agree), "detail": ""}
