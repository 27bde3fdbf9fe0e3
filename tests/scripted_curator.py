"""A strong curator for tests, as a function from a request's body to its answer.

It reads the same prompts as a model would and knows nothing else: it claims the commonest kinds of
failure, proposes to write tasks, and writes tasks of letters to count.
"""

from __future__ import annotations

import json
import random
from typing import Any

KIND_OF_CATEGORY = {
    "no_answer": "format",
    "no_code": "format",
    "truncated": "incomplete",
    "wrong_answer": "arithmetic",
}


def reply(body: dict[str, Any]) -> str:
    """The content of the answer to a chat completion's request."""
    data = json.loads(body["messages"][1]["content"])["data"]
    if "failures" in data:
        return json.dumps({"weaknesses": claims(data["failures"])})
    if "arms" in data:
        return json.dumps(proposal(data))
    return json.dumps({"tasks": exercises(data)})


def claims(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each skill and kind of failure that is shown at least three times."""
    found: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        kind = KIND_OF_CATEGORY.get(failure["category"])
        if kind:
            found.setdefault((failure["skill"], kind), []).append(failure["id"])
    return [
        {
            "skill": skill,
            "kind": kind,
            "evidence_task_ids": sorted(set(ids))[:5],
            "severity": round(len(ids) / len(failures), 2),
            "rationale": f"{len(ids)} of the shown answers fail so.",
        }
        for (skill, kind), ids in sorted(found.items())
        if len(ids) >= 3
    ]


def proposal(data: dict[str, Any]) -> dict[str, Any]:
    """The first written form that was not tried yet, else the one with the best gain."""
    forms = [a for a in data["arms"] if a["strategy"] in ("targeted", "worked")]
    arms = forms or data["arms"]
    best = max(arms, key=lambda a: 1.0 if a["mean_gain"] is None else a["mean_gain"])
    return {
        "strategy": best["strategy"],
        "focus": [w["skill"] for w in data["weaknesses"][:1]],
        "difficulty": 0.25,
        "learning_rate_scale": 1.0,
        "num_tasks": 8,
    }


def exercises(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Letters to count in short words, wrong references among them."""
    rng = random.Random(json.dumps(data["examples"]))
    made = []
    for number in range(data["order"]["tasks"]):
        letters = [rng.choice("pqrs") for _ in range(5)]
        count = letters.count("p")
        if number == 0 or not 1 <= count <= 2:
            letters = ["q", "p", "r", "s", "q"][:5]
            rng.shuffle(letters)
            count = 1
        wrong = number == 0  # every strong model slips now and then
        made.append(
            {
                "prompt": f"Count each p in {' '.join(letters)}.",
                "domain": "math",
                "answer": str(count + wrong),
                "reference_solution": f"{'p ' * count}= \\boxed{{{count}}}",
                "difficulty": data["order"]["difficulty"],
                "skill": data["weakness"]["skill"],
            }
        )
    return made
