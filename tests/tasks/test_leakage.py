"""What a model writes must neither repeat the evaluation nor be answered by anything at all."""

import dataclasses

import pytest
from scripted_admission import code_task, math_task, run_code

from cosr_jax.config import VerifierConfig
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.leakage import Leakage, near_duplicates
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.tasks.wrong_answers import idle_answers, perturbed_answers
from cosr_jax.types import Outcome, ProofChecks, Task, Verdict
from cosr_jax.verifiers.pool import VerifierPool

LONG = (
    "A farmer keeps 12 hens and each of them lays 3 eggs in a week; "
    "how many eggs does the farmer collect in 5 weeks?"
)
SUMS = "def total(xs):\n    result = 0\n    for x in xs:\n        result += x\n    return result"


def test_thirteen_words_in_a_row_are_an_overlap():
    leakage = Leakage([math_task(LONG)])
    words = LONG.split()
    assert leakage.finds(math_task(f"Think. {' '.join(words[3:16]).upper()}, and so on?"))
    assert not leakage.finds(math_task(f"Think. {' '.join(words[3:15])} then?"))
    assert not leakage.finds(math_task("How many eggs do 7 hens lay?"))


def test_a_short_prompt_counts_as_a_whole_without_its_instruction():
    leakage = Leakage([ProceduralSuite().draw("addition/2", 1, "test")])
    (prompt,) = [ProceduralSuite().draw("addition/2", 1, "test").prompt]
    ask = prompt.partition("Put the final")[0].strip()
    assert leakage.finds(math_task(f"Please tell me: {ask} Thanks."))
    assert not leakage.finds(math_task(ask.replace(ask.split()[-1], "99999.")))


def test_wording_that_many_evaluation_prompts_share_is_nobodys():
    template = "How many of the {} small red marbles in the large glass jar on the table are round?"
    few = [math_task(template.format(n)) for n in range(9)]
    many = [math_task(template.format(n)) for n in range(10)]
    new = math_task(template.format("forty"))
    assert Leakage(few).finds(new)
    assert not Leakage(many).finds(new)


def test_programs_are_compared_without_their_names():
    leakage = Leakage([code_task("Write total(xs).", "total", SUMS)])
    same = (
        'def add_up(numbers: list[int]) -> int:\n    """Adds."""\n    acc = 0\n'
        "    for n in numbers:\n        acc += n\n    return acc"
    )
    assert leakage.finds(code_task("Sum numbers with add_up.", "add_up", same))
    other = same.replace("acc += n", "acc -= n")
    assert not leakage.finds(code_task("Subtract numbers with add_up.", "add_up", other))
    called = code_task("Sort with f.", "f", "def f(xs):\n    return sorted(xs)")
    assert not Leakage([called]).finds(
        code_task("Reverse with f.", "f", "def f(xs):\n    return list(xs)")
    )


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        ("A farmer keeps 12 hens and each one of them lays 3 eggs in a week; "
         "how many eggs does the farmer collect in 5 weeks?", True),
        (LONG.replace("12", "13"), False),
        ("With 12 hens, 3 eggs a week each and 5 weeks: how many eggs?", False),
    ],
)  # fmt: skip
def test_near_duplicates_have_the_same_numbers_and_nearly_the_same_words(other, is_near):
    assert near_duplicates(LONG, [other]) is is_near


def test_perturbed_answers_are_other_answers():
    assert perturbed_answers(math_task("?", "12")) == (r"\boxed{13}",)
    assert perturbed_answers(math_task("?", "1, 2, 9")) == (r"\boxed{1, 2, 10}",)
    assert perturbed_answers(math_task("?", "x")) == (r"\boxed{x + 1}",)
    task = code_task("Write total.", "total", SUMS)
    (wrong,) = perturbed_answers(task)
    assert run_code(task, task.solution) and not run_code(task, wrong)
    assert not run_code(task, *idle_answers(task))
    for body in ("xs.sort()", "yield 1", "pass"):
        assert perturbed_answers(code_task("f", "f", f"def f(xs):\n    {body}")) == ()
    proof = Task("proof", "s", 0.5, "p", "", "k", "", checks=ProofChecks("smtlib", ""))
    assert perturbed_answers(proof) == ()


def judge(cases):
    """Runs code; compares boxes as text; cannot judge what asks for it."""

    def verdict(task, text):
        if "unjudgeable" in task.prompt:
            return Outcome.ERROR
        if task.domain == "code":
            right = run_code(task, text)
        else:
            right = text.endswith(f"\\boxed{{{task.answer}}}") or "anything" in task.prompt
        return Outcome.PASS if right else Outcome.FAIL

    return [Verdict(verdict(task, done.text), 1.0) for task, done in cases]


def test_each_fault_of_an_authored_task_has_its_reason():
    held_out = math_task(LONG, "180")
    known = math_task("There are 3 cats and 4 dogs in the house. How many animals is that?", "7")
    weak = code_task("Write total(xs).", "total", SUMS, tests=("assert total([1]) > 0",))
    batch = [
        math_task("How many legs have 3 cats?", "12"),
        held_out,
        math_task(f"Riddle: {LONG}", "180"),
        math_task("Well, there are 3 cats and 4 dogs in the house. How many animals is that?", "7"),
        math_task("How many legs have 4 cats?", "16", solution=r"\boxed{15}"),
        math_task(r"Say \boxed{8}.", "8"),
        math_task("Say anything.", "8"),
        math_task("This is unjudgeable.", "8"),
        weak,
        dataclasses.replace(weak, prompt="Write a function.", key="unnamed"),
        code_task("Write double(x), which returns 2 x.", "double",
                  "def double(x):\n    return 2 * x", tests=("assert double(4) == 8",)),
    ]  # fmt: skip
    result = Admission(judge, [held_out]).admit_authored(batch, [known])
    assert [task.answer for task in result.tasks] == ["12", ""]
    assert result.tasks[0].prompt.endswith("Put the final answer in \\boxed{}.")
    assert result.refused == {
        "reserved": 1,
        "overlap": 1,
        "duplicate": 1,
        "unproven": 1,
        "statement": 2,
        "vacuous": 2,
        "unjudged": 1,
    }


def test_the_verifiers_themselves_admit_and_refuse():
    sums = ("assert total([1, 2]) == 3", "assert total([]) == 0")
    good = code_task("Write total(xs), the sum of xs.", "total", SUMS, sums)
    weak = code_task("Write size(xs).", "size", "def size(xs):\n    return len(xs)",
                     ("assert size([1]) > 0",))  # fmt: skip
    wrong = math_task("What is 2 plus 2?", "4", r"\boxed{5}")
    right = math_task("What is 2 plus 3?", "5")
    with VerifierPool(VerifierConfig()) as pool:
        result = Admission(pool.judge, []).admit_authored([good, weak, wrong, right])
    assert [task.key for task in result.tasks] == [good.key, right.key]
    assert result.refused == {"vacuous": 1, "unproven": 1}
