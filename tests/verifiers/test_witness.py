import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.types import CATEGORIES, Completion, Outcome, ProofChecks
from cosr_jax.verifiers import witness
from cosr_jax.verifiers.proof import witness_verdict
from cosr_jax.verifiers.terms import Refusal

SQUARE = {"nodes": 4, "edges": [[1, 2], [2, 3], [3, 4], [4, 1]], "colours": 2}
PATH = {"nodes": 4, "edges": [[1, 3], [3, 2], [2, 4]]}
JOBS = {"durations": [3, 2, 2], "machines": 2, "deadline": 5, "before": [[1, 3]]}
SUM = {"numbers": [3, 3, 5, 8, -2], "target": 6}
INSTANCES = {
    "factorisation": {"number": 84},
    "graph_colouring": SQUARE,
    "scheduling": JOBS,
    "subset_sum": SUM,
    "hamiltonian_path": PATH,
}
RIGHT = [
    ("factorisation", "\\boxed{2, 2, 3, 7}"),
    ("factorisation", "We divide. \\boxed{[7,3,2,2]}"),
    ("factorisation", "2, 2, 3, 7"),
    ("factorisation", "<answer>2 2 3 7</answer>"),
    ("factorisation", "```json\n[2, 2, 3, 7]\n```"),
    ("factorisation", "The answer is 2, 2, 3, 7."),
    ("graph_colouring", "[1, 2, 1, 2]"),
    ("graph_colouring", "\\boxed{2, 1, 2, 1}"),
    ("scheduling", "<answer>[[1, 0], [2, 0], [1, 3]]</answer>"),
    (
        "scheduling",
        "```\n[[1, 0], [2, 3], [2, 3]]\n```".replace("[2, 3], [2, 3]", "[2, 1], [2, 3]"),
    ),
    ("subset_sum", "\\boxed{3, 3}"),
    ("subset_sum", "\\boxed{8, -2}"),
    ("hamiltonian_path", "\\boxed{1, 3, 2, 4}"),
    ("hamiltonian_path", "\\boxed{4, 2, 3, 1}"),
]
WRONG = [
    ("factorisation", "\\boxed{84}", "wrong_answer"),
    ("factorisation", "\\boxed{4, 3, 7}", "wrong_answer"),
    ("factorisation", "\\boxed{1, 2, 2, 3, 7}", "wrong_answer"),
    ("factorisation", "\\boxed{2, 3, 7}", "wrong_answer"),
    ("factorisation", "\\boxed{-2, -2, 3, 7}", "wrong_answer"),
    ("factorisation", "\\boxed{0}", "wrong_answer"),
    ("factorisation", "<answer>[]</answer>", "wrong_answer"),
    ("factorisation", "<answer>[true, 2, 2, 3, 7]</answer>", "syntax_error"),
    ("factorisation", "<answer>[2.0, 2, 3, 7]</answer>", "syntax_error"),
    ("factorisation", "<answer>[NaN]</answer>", "syntax_error"),
    ("factorisation", "<answer>[1e400]</answer>", "syntax_error"),
    ("factorisation", "<answer>[[2, 2, 3, 7]]</answer>", "wrong_answer"),
    ("factorisation", '<answer>{"a": 2}</answer>', "syntax_error"),
    ("factorisation", '<answer>["2", 2, 3, 7]</answer>', "syntax_error"),
    ("factorisation", "<answer>null</answer>", "syntax_error"),
    ("factorisation", "<answer>" + "9" * 5000 + "</answer>", "forbidden"),
    ("factorisation", "<answer>" + "1, " * 9000 + "1</answer>", "forbidden"),
    ("factorisation", "<answer>" + "[" * 9000 + "</answer>", "syntax_error"),
    ("factorisation", "<answer>\uff12, 2, 3, 7</answer>", "syntax_error"),
    ("factorisation", "I think that 2 and 2 and 3 and 7 are the factors", "no_answer"),
    ("factorisation", "<think>\\boxed{2, 2, 3, 7}</think>", "no_answer"),
    ("factorisation", "\\boxed{2, 2, 3, 7", "no_answer"),
    ("factorisation", "<answer>2, 2, 3, 7 or 84</answer>", "no_answer"),
    ("factorisation", "", "no_answer"),
    ("graph_colouring", "\\boxed{1, 1, 2, 2}", "wrong_answer"),
    ("graph_colouring", "\\boxed{1, 2, 3, 2}", "wrong_answer"),
    ("graph_colouring", "\\boxed{1, 2, 1, 0}", "wrong_answer"),
    ("graph_colouring", "\\boxed{1, 2}", "wrong_answer"),
    ("graph_colouring", "\\boxed{1, 2, 1, 2, 1}", "wrong_answer"),
    ("graph_colouring", "<answer>[true, 2, true, 2]</answer>", "syntax_error"),
    ("graph_colouring", "<answer>[[1], 2, 1, 2]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [1, 0], [1, 0]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [1, 2], [2, 3]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [2, 0], [2, 2]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [3, 0], [1, 3]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, -3], [2, 0], [1, 0]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [2, 0], [1, 4]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0], [2, 0]]</answer>", "wrong_answer"),
    ("scheduling", "<answer>[[1, 0, 0], [2, 0], [1, 3]]</answer>", "wrong_answer"),
    ("scheduling", "\\boxed{1, 2, 1}", "wrong_answer"),
    ("subset_sum", "\\boxed{6}", "wrong_answer"),
    ("subset_sum", "\\boxed{8, -2, -2, 2}", "wrong_answer"),
    ("subset_sum", "\\boxed{3, 5}", "wrong_answer"),
    ("subset_sum", "<answer>[]</answer>", "wrong_answer"),
    ("hamiltonian_path", "\\boxed{1, 2, 3, 4}", "wrong_answer"),
    ("hamiltonian_path", "\\boxed{1, 3, 2}", "wrong_answer"),
    ("hamiltonian_path", "\\boxed{1, 3, 1, 3, 2, 4}", "wrong_answer"),
]


def judge(program, text, finish_reason="stop"):
    checks = ProofChecks("witness", program, json.dumps(INSTANCES[program]))
    return witness_verdict(checks, Completion((), (), text, finish_reason))


@pytest.mark.parametrize(("program", "text"), RIGHT)
def test_a_witness_passes_in_every_accepted_form(program, text):
    verdict = judge(program, text)
    assert verdict.outcome is Outcome.PASS, verdict
    assert (verdict.reward, verdict.value_correct) == (1.0, True)


@pytest.mark.parametrize(("program", "text", "category"), WRONG)
def test_what_is_no_witness_fails_with_its_category(program, text, category):
    verdict = judge(program, text)
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, category), verdict
    assert (verdict.reward, verdict.value_correct) == (0.0, False)


def test_a_witness_that_may_be_cut_does_not_count():
    assert judge("subset_sum", "3, 3", "length").category == "truncated"
    assert judge("subset_sum", "\\boxed{3, 3} since", "length").outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("program", "instance"),
    [
        ("nothing", {}),
        ("factorisation", {}),
        ("factorisation", {"number": True}),
        ("factorisation", {"number": 10**30}),
        ("factorisation", []),
        ("graph_colouring", {**SQUARE, "edges": [[1, 5]]}),
        ("graph_colouring", {**SQUARE, "edges": [[1, 1]]}),
        ("graph_colouring", {**SQUARE, "edges": [[1, 2, 3]]}),
        ("graph_colouring", {**SQUARE, "nodes": 10**8}),
        ("scheduling", {**JOBS, "durations": [0]}),
        ("scheduling", {**JOBS, "durations": []}),
        ("subset_sum", {**SUM, "numbers": [1.5]}),
        ("subset_sum", {**SUM, "target": "6"}),
    ],
)
def test_an_unreadable_task_is_an_error(program, instance):
    checks = ProofChecks("witness", program, json.dumps(instance))
    verdict = witness_verdict(checks, Completion((), (), "\\boxed{1}", "stop"))
    assert (verdict.outcome, verdict.detail[:5]) == (Outcome.ERROR, "task:")


def test_primes_are_told_from_composites():
    sieve = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(-3, 2000) if witness.is_prime(n)] == sieve
    # Strong pseudoprimes to many small bases, and a Carmichael number.
    for composite in (2047, 3215031751, 3825123056546413051, 318665857834031151167461, 561):
        assert not witness.is_prime(composite)
    assert witness.is_prime(2**61 - 1)


@given(st.text('0123456789,[]- \ntruefalsenulNaN.e{}:"', max_size=80))
def test_reading_refuses_or_gives_integers(text):
    try:
        for value in witness.read(text):
            assert all(type(v) is int for v in (value if isinstance(value, list) else [value]))
    except Refusal as refusal:
        assert refusal.category in CATEGORIES
