"""Asks a scorer of reasoning-gym, inside a worker process: importing this module imports it.

A scorer is believed about an item only after it gave the item's own answer the full score, and
less to garbage and to the own answer wrapped in hedges.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from cosr_jax.verifiers.gym import RUNS_ITS_INPUT
from cosr_jax.verifiers.worker import Unjudgeable

# Without the extra this module can be looked at, but not used: GymJudge.start says so first.
with contextlib.suppress(ModuleNotFoundError):
    from reasoning_gym.factory import get_score_answer_fn

_GARBAGE = ("", " ", "qwertz", "I do not know", "()", "[]", "{}", "0x", "None", "nan", "9" * 400)
_HEDGES = ("{} or not", "It is {} or 77", "{}\n{}", "{}{}", "not {}")


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """Scores one answer.

    Args:
      case: {"generator": name, "item": {"question", "answer", "metadata"}, "answer": str}.

    Returns:
      {"score": float, "detail": str}; an answer on which the scorer fails has score 0.

    Raises:
      Unjudgeable: the generator is unknown, or its scorer is not to be believed about this item.
    """
    name, item = case["generator"], case["item"]
    check_scorer(name, json.dumps(item))
    try:
        return {"score": float(_scorer(name)(case["answer"], item)), "detail": ""}
    except MemoryError:
        raise
    except Exception as error:  # it coped with the item's own answer: this one is to blame
        return {"score": 0.0, "detail": f"{type(error).__name__}: {error}"[:200]}


@functools.lru_cache(maxsize=64)
def check_scorer(name: str, text: str) -> None:
    """Raises ``Unjudgeable`` unless the scorer of ``name`` can tell answers to an item apart.

    Args:
      name: the generator.
      text: the item, as JSON.
    """
    if name in RUNS_ITS_INPUT:
        raise Unjudgeable(f"the scorer of {name!r} runs what it is given")
    item = json.loads(text)
    own = item["answer"]
    score = _scorer(name)
    try:
        given = score(own, item)
    except Exception as error:
        raise Unjudgeable(f"the scorer of {name!r} fails on the item's own answer") from error
    if given != 1.0:
        raise Unjudgeable(f"the scorer of {name!r} gives the item's own answer {given}")
    for garbage in (*_GARBAGE, *(hedge.format(own, own) for hedge in _HEDGES)):
        if _pays(score, garbage, item):
            raise Unjudgeable(f"the scorer of {name!r} pays for {garbage[:40]!r}")


def _pays(score: Callable[[str, Any], float], text: str, item: Mapping[str, Any]) -> bool:
    try:
        return not score(text, item) < 1.0  # NaN pays too
    except Exception:  # refusing loudly is refusing
        return False


@functools.cache
def _scorer(name: str) -> Callable[[str, Any], float]:
    try:
        return get_score_answer_fn(name)
    except ValueError as error:
        raise Unjudgeable(f"reasoning-gym has no generator {name!r}") from error
