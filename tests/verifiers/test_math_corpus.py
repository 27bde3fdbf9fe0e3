"""The corpus of answers, right and wrong: each is judged as a careful reader would judge it."""

import json
from pathlib import Path

import pytest
from clocks import cpu_s

from cosr_jax.verifiers.math_answer import answers_agree
from cosr_jax.verifiers.symbolic import symbolically_equal

CORPUS = Path(__file__).parent / "corpus" / "math_pairs.jsonl"
CASES = [json.loads(line) for line in CORPUS.read_text().splitlines()]


def test_the_corpus_is_as_large_as_promised():
    assert len(CASES) >= 200
    assert sum(case["agree"] for case in CASES) >= 200
    assert len({(case["given"], case["gold"]) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in CASES}))
def test_answers_are_judged_as_a_careful_reader_would(kind):
    for case in (case for case in CASES if case["kind"] == kind):
        found = answers_agree(case["given"], case["gold"], symbolically_equal)
        assert found is case["agree"], case


def test_without_algebra_nothing_is_decided_otherwise_and_nothing_takes_long():
    for case in CASES:
        assert cpu_s(answers_agree, case["given"], case["gold"]) < 0.5, case  # milliseconds
        found = answers_agree(case["given"], case["gold"])
        assert found in (case["agree"], None), case
