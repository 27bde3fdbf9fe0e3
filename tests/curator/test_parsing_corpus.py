"""Raw outputs, each with the value or the kind of error that the rules demand.

A line of ``corpus/*.jsonl`` holds the response, what its call knows besides ``KNOWN``, and what it
must come to.
"""

import json
from pathlib import Path

import pytest
from fake_judge import judge

from cosr_jax.curator.parsing import Response, parse
from cosr_jax.curator.schemas import Context

KNOWN = {
    "known_task_ids": ("t1", "t2", "t3", "t4"),
    "known_skills": ("addition", "carrying", "functions"),
    "known_strategies": ("raise", "lower"),
    "limits": {"learning_rate_scale": (0.1, 2.0), "num_tasks": (1, 64)},
}
CASES = [
    json.loads(line)
    for path in sorted((Path(__file__).parent / "corpus").glob("*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_raw_output(case):
    context = Context(**{**KNOWN, **case.get("context", {})})
    result = parse(case["schema"], Response(**case["response"]), context, judge)
    expected = case["expect"]
    assert (result.value, result.error) == (expected["value"], expected["error"]), result
    assert result.dropped == expected["dropped"], result.drops
    assert list(result.dropped_ids) == expected["dropped_ids"]
    assert result.reasons == expected.get("reasons", result.reasons)


def test_the_corpus_is_broad():
    assert len(CASES) >= 250
    assert len({case["id"] for case in CASES}) == len(CASES)
    kinds = {case["expect"]["error"] for case in CASES}
    in_memory = {"too_large", "transport"}  # a million characters; the client's own
    assert kinds == {
        *("", "empty", "no_final", "truncated", "not_json", "refusal", "html", "schema"),
        *("all_dropped", "ambiguous", "server_error"),
    }, in_memory
