"""Authored tasks prove themselves: what the judge is asked, and what comes of its verdicts."""

import json

import pytest
from fake_judge import judge

from cosr_jax.config import VerifierConfig
from cosr_jax.curator.overlap import Phrases, fold
from cosr_jax.curator.parsing import Response, parse
from cosr_jax.curator.proving import Unproven, as_task, last_value
from cosr_jax.curator.schemas import Context
from cosr_jax.types import CodeChecks, Outcome, UserError, Verdict
from cosr_jax.verifiers.pool import VerifierPool

CONTEXT = Context(known_skills=("addition", "functions"))
MATHS = {
    "prompt": "Compute 12 + 7.",
    "domain": "math",
    "answer": "19",
    "reference_solution": "That is \\boxed{19}.",
    "difficulty": 0.25,
    "skill": "addition",
}
CODE = {
    "prompt": "Write a Python function double(x) that returns twice x.",
    "domain": "code",
    "tests": ["assert double(2) == 4", "assert double(-1) == -2"],
    "reference_solution": "import math\n\nSIZE = 2\n\ndef double(x):\n    return SIZE * x\n",
    "difficulty": 0.5,
    "skill": "functions",
}


def read(*tasks, judge=judge, context=CONTEXT):
    return parse("tasks", Response(json.dumps({"tasks": tasks})), context, judge)


class Spy:
    """A judge that gives the same verdict to all cases and remembers them."""

    def __init__(self, verdict=Verdict(Outcome.PASS, 1.0)):  # noqa: B008, frozen
        self.verdict = verdict
        self.calls = []

    def __call__(self, cases):
        self.calls.append(list(cases))
        return [self.verdict for _ in cases]


def test_code_without_a_judge_is_never_believed():
    with pytest.raises(ValueError, match="parse them with a judge"):
        read(CODE, judge=None)


def test_maths_without_a_judge_compares_rational_numbers():
    assert read(MATHS, judge=None).value == {"tasks": [MATHS]}
    for answer, value, same in (
        ("0.5", "\\frac{1}{2}", True),
        ("1,200", "1200", True),
        ("x+1", "x + 1", True),
        ("1/2", "0.51", False),
        ("1/0", "0/0", False),
        ("9" * 5000, "9" * 4999, False),
        ("1e999999999", "1", False),
    ):
        task = MATHS | {"answer": answer, "reference_solution": f"\\boxed{{{value}}}"}
        assert bool(read(task, judge=None).value) is same, (answer, value)


def test_the_judge_sees_the_reference_and_each_test_without_it():
    spy = Spy()
    result = read(MATHS, CODE, judge=spy)
    ((maths, code, *hollow),) = spy.calls
    assert maths[1].text == "\\boxed{19}" and maths[0].answer == "19"
    assert CODE["reference_solution"] in code[1].text
    assert code[0].checks == CodeChecks("double", tuple(CODE["tests"]))
    assert [task.checks.tests for task, _ in hollow] == [(test,) for test in CODE["tests"]]
    for _, completion in hollow:
        assert "import math" in completion.text
        assert "return SIZE" not in completion.text
        assert "def double(*args, **kwargs):\n    raise NotImplementedError" in completion.text
    assert result.reasons == {"vacuous": 1}  # as everything passes, with the solution or without


def test_a_verifier_in_trouble_proves_nothing():
    result = read(MATHS, judge=Spy(Verdict(Outcome.ERROR, 0.0)))
    assert (result.error, result.reasons) == ("all_dropped", {"unjudged": 1})


def test_a_right_value_in_a_form_that_the_run_does_not_accept_is_right():
    verdict = Verdict(Outcome.FAIL, 0.0, "no_answer", value_correct=True)
    assert read(MATHS, judge=Spy(verdict)).value == {"tasks": [MATHS]}
    assert read(CODE, judge=Spy(verdict)).reasons == {"reference": 1}


def test_a_judge_that_loses_cases_is_noticed():
    with pytest.raises(ValueError, match="0 verdicts for 1 cases"):
        read(MATHS, judge=lambda cases: [])


def test_no_more_is_judged_than_may_be_kept():
    spy = Spy()
    tasks = [MATHS | {"prompt": f"Compute {n} + 7."} for n in range(9)]
    context = Context(known_skills=("addition",), max_items=2)
    result = read(*tasks, judge=spy, context=context)
    assert [len(call) for call in spy.calls] == [2]
    assert result.value == {"tasks": tasks[:2]}
    assert result.reasons == {"too_many": 7}


def test_as_task_makes_a_task_that_the_verifier_can_judge():
    task = as_task(CODE)
    assert (task.domain, task.skill, task.difficulty) == ("code", "functions", 0.5)
    assert task.checks.entry_point == "double"
    assert judge([(task, type("C", (), {"text": task.solution}))])[0].outcome is Outcome.PASS
    assert as_task(MATHS).answer == "19"
    assert as_task(MATHS).task_id == as_task(MATHS | {"prompt": "compute 12+7"}).task_id


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {x}", "x"),
        ("It is 7.", "7"),
        ("5 - 3", "3"),
        ("x = -3.", "-3"),
        ("so 1,234.5", "1,234.5"),
        ("\\frac{3}{4}", "\\frac{3}{4}"),
        ("it is 3/4", "3/4"),
        ("50%", "50%"),
        ("x2 is 4 and y3", "4"),
    ],
)
def test_last_value(reference, value):
    assert last_value(reference) == value


@pytest.mark.parametrize(
    "reference", ["", "none", "\\boxed{}", "4 \\boxed{4", "\\boxed{1} \\boxed{ }"]
)
def test_no_last_value(reference):
    with pytest.raises(Unproven):
        last_value(reference)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Compute 12 + 7.", "compute 12+7"),
        ("What is\n 3 \u00d7 4?", "what is 3 * 4"),
        ("A two-digit number", "A two digit number!"),
        ("and/or **bold** _it_", "and or bold it"),
        ("1,000 apples", "1000 apples"),
        ("\uff37hat \u200bnow", "what now"),
        ("Solve $x-y=2$", "solve x - y = 2"),
        ("'x' (one) [two]", "x one two"),
    ],
)
def test_near_verbatim_prompts_fold_to_one(one, other):
    assert fold(one) == fold(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12 + 7", "12 - 7"),
        ("3 * 4", "3 / 4"),
        ("2x + 3 = 7", "2x - 3 = 7"),
        ("(2 + 3) * 4", "2 + 3 * 4"),
        ("1.5", "15"),
        ("x < 3", "x > 3"),
        ("12 + 3", "1 + 23"),
        ("5%", "5"),
    ],
)
def test_different_questions_do_not(one, other):
    assert fold(one) != fold(other)


def test_phrases_are_found_as_whole_words():
    phrases = Phrases(["", "the sum of 2 + 3", "one two three four five six seven eight nine ten"])
    assert phrases.found_in("what is the sum of 2 + 3 now")
    assert phrases.found_in("zero one two three four five six seven eight nine ten")
    assert not phrases.found_in("zero one two three four five six seven eight nine")
    assert not phrases.found_in("the sum of 2 + 34")
    assert not phrases.found_in("")


def test_the_verifier_of_this_package_proves_tasks():
    wrong = CODE | {"prompt": "Halve x.", "reference_solution": "def double(x):\n    return x\n"}
    vacuous = CODE | {"prompt": "Treble x.", "tests": ["assert callable(double)"]}
    with VerifierPool(VerifierConfig(workers=1)) as pool:
        try:
            result = read(MATHS, CODE, wrong, vacuous, judge=pool.judge)
        except UserError as error:
            if "no isolation layer works on this machine" not in str(error):
                raise
            pytest.skip(str(error))
    assert result.value == {"tasks": [MATHS, CODE]}, result
    assert result.reasons == {"reference": 1, "vacuous": 1}
