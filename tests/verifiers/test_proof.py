import asyncio
import importlib.util
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.types import CATEGORIES, Completion, Outcome, ProofChecks, Task
from cosr_jax.verifiers import property_text, smt_text
from cosr_jax.verifiers.dispatch import Answer, Workers
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.proof import ProofJudge
from cosr_jax.verifiers.terms import Refusal, definedness

needs_z3 = pytest.mark.skipif(
    importlib.util.find_spec("z3") is None, reason="z3-solver is not installed"
)

MAX2 = """
(declare-fun max2 (Int Int) Int)
(declare-const x Int)
(declare-const y Int)
(assert (>= (max2 x y) x))
(assert (>= (max2 x y) y))
(assert (or (= (max2 x y) x) (= (max2 x y) y)))
"""
#: A fixed root: the constant may not be picked after x.
BOUND = """
(declare-fun c () Int)
(declare-const x Int)
(assert (> x 10)) ; an assumption
(assert (and (> c 0) (< c x)))
"""
INVARIANT = """
(declare-fun inv (Int Int) Bool)
(declare-const i Int)
(declare-const n Int)
(define-fun start ((i Int) (n Int)) Bool (and (= i 0) (>= n 0)))
(assert (=> (start i n) (inv i n)))
(assert (=> (and (inv i n) (< i n)) (inv (+ i 1) n)))
(assert (=> (and (inv i n) (not (< i n))) (= i n)))
"""
BITS = """
(declare-fun low (( _ BitVec 8)) (_ BitVec 8))
(declare-const x (_ BitVec 8))
(assert (= (low x) (bvand x (bvneg x))))
"""
MEAN = json.dumps(
    {
        "function": "mean",
        "parameters": {"a": "Real", "b": "Real"},
        "returns": "Real",
        "variables": {"x": "Real", "y": "Real"},
        "assume": ["x < y"],
    }
)
MEAN_GOAL = "x < mean(x, y) < y\nmean(x, y) - x == y - mean(x, y)"
REMAINDER = json.dumps(
    {
        "function": "r",
        "parameters": {"a": "Int", "b": "Int"},
        "returns": "Int",
        "variables": {"x": "Int", "y": "Int"},
        "assume": ["y != 0"],
    }
)
REMAINDER_GOAL = "abs(r(x, y)) < abs(y)\nr(x, y) == x % y"


def smtlib(goal):
    return ProofChecks("smtlib", goal)


def properties(goal, instance):
    return ProofChecks("property", goal, instance)


def fenced(text, label=""):
    return f"Here it is.\n```{label}\n{text}\n```\n"


def max2(body, head="(define-fun max2 ((a Int) (b Int)) Int"):
    return fenced(f"{head} {body})", "smt2")


CHECKS = {
    "max2": smtlib(MAX2),
    "bound": smtlib(BOUND),
    "inv": smtlib(INVARIANT),
    "bits": smtlib(BITS),
    "mean": properties(MEAN_GOAL, MEAN),
    "rem": properties(REMAINDER_GOAL, REMAINDER),
}
HONEST = [
    ("max2", max2("(ite (> a b) a b)")),
    ("max2", "<answer>(define-fun max2 ((p Int) (q Int)) Int (ite (<= p q) q p))</answer>"),
    ("max2", "(define-fun max2 ((y Int) (x Int)) Int (ite (> x y) x y))"),  # names are its own
    ("max2", "<think>(ite a b)</think>" + max2("(let ((d (- a b))) (ite (>= d 0) a b))")),
    ("max2", max2("(div 1 0)") + max2("(ite (> a b) ; a comment\n a b)")),  # the last counts
    ("max2", max2("(ite (or (= b 0) (> (div a b) 100000)) (ite (> a b) a b) (ite (> b a) b a))")),
    ("bound", "5"),
    ("bound", "```\n(define-fun c () Int 10)\n```"),
    ("inv", fenced("(define-fun inv ((i Int) (n Int)) Bool (<= i n))")),
    ("bits", fenced("(define-fun low ((v (_ BitVec 8))) (_ BitVec 8) (bvand v (bvneg v)))")),
    (
        "bits",
        fenced("(define-fun low ((v (_ BitVec 8))) (_ BitVec 8) (bvand v (bvadd (bvnot v) #x01)))"),
    ),
    ("mean", "(a + b) / 2"),
    ("mean", fenced("def mean(a, b):\n    return a + (b - a) / 2", "python")),
    ("mean", fenced("lambda u, v: 0.5 * (u + v)", "python")),
    ("rem", "a % b"),
    ("rem", "a - b * (a // b)"),
    (
        "rem",
        fenced("def r(p, q):\n  if q > 0:\n    return p % q\n  else:\n    return -(-p % -q)"),
    ),
]
WRONG = [
    ("max2", max2("a"), "wrong_answer"),
    ("max2", max2("(+ a b)"), "wrong_answer"),
    ("max2", max2("(div 1 0)"), "wrong_answer"),
    # Defined by luck of SMT-LIB's total division, but it divides by zero on the way.
    ("max2", max2("(ite (= (div a b) (div a b)) (ite (> a b) a b) a)"), "wrong_answer"),
    ("max2", max2("(ite (> (mod a b) 0) (ite (> a b) a b) (ite (> a b) a b))"), "wrong_answer"),
    ("max2", max2("(ite (> a b) a b)") + max2("a"), "wrong_answer"),
    ("max2", max2("true"), "syntax_error"),
    ("max2", max2("(ite (> a b) a b"), "syntax_error"),
    ("max2", max2("(ite (> a b) a b))"), "syntax_error"),
    ("max2", max2("(ite (> x y) x y)"), "syntax_error"),  # variables of the goal are out of reach
    ("max2", max2("(max2 a b)"), "forbidden"),  # nothing is recursive
    ("max2", max2("(ite (forall ((z Int)) (> a z)) a b)"), "forbidden"),
    ("max2", max2("(exists ((z Int)) true)"), "forbidden"),
    ("max2", max2("(select a b)"), "forbidden"),
    ("max2", max2("(! a :named b)"), "syntax_error"),
    ("max2", max2("|a|"), "syntax_error"),
    ("max2", max2('"a"'), "syntax_error"),
    ("max2", fenced("(assert false)"), "forbidden"),
    ("max2", fenced("(push)"), "forbidden"),
    ("max2", fenced("(set-option :rlimit 1)"), "forbidden"),
    ("max2", fenced('(include "x")'), "syntax_error"),
    ("max2", fenced("(define-fun-rec max2 ((a Int) (b Int)) Int (max2 b a))"), "forbidden"),
    ("max2", max2("(ite (> a b) a b)").replace("```\n", "(assert false)\n```\n"), "syntax_error"),
    ("max2", fenced("(define-fun max2 ((a Int)) Int a)"), "missing_entry_point"),
    ("max2", fenced("(define-fun max3 ((a Int) (b Int)) Int a)"), "missing_entry_point"),
    ("max2", fenced("(define-fun x () Int 1)"), "missing_entry_point"),
    ("max2", fenced("(define-fun >= ((a Int) (b Int)) Bool true)"), "forbidden"),
    ("max2", max2("a", "(define-fun max2 ((a Int) (b Int)) Real"), "syntax_error"),
    ("max2", max2("a", "(define-fun max2 ((a Int) (a Int)) Int"), "syntax_error"),
    ("max2", max2("a", "(define-fun max2 ((>= Int) (b Int)) Int"), "forbidden"),
    ("max2", max2("(let ((not a)) (ite (> a b) a b))"), "forbidden"),
    ("max2", max2("(let ((t a) (t b)) t)"), "syntax_error"),
    ("max2", max2("(" * 100 + ")" * 100), "forbidden"),
    ("max2", max2("1" * 50), "syntax_error"),
    ("max2", max2("(+ a " + "1 " * 9000 + ")"), "forbidden"),
    ("max2", fenced("ite"), "missing_entry_point"),
    ("max2", fenced("((a))"), "missing_entry_point"),
    ("max2", "The maximum is the larger of the two.", "no_answer"),
    ("max2", "<think>" + max2("(ite (> a b) a b)") + "</think>", "no_answer"),
    ("max2", "<think>" + max2("(ite (> a b) a b)"), "no_answer"),
    ("max2", "<answer>" + max2("(ite (> a b) a b)"), "no_answer"),
    ("max2", "", "no_answer"),
    ("max2", "\ud800\x00", "no_answer"),
    ("bound", "11", "wrong_answer"),
    ("bound", "(- x 1)", "no_answer"),
    ("bound", fenced("(- x 1)"), "syntax_error"),
    ("bound", fenced("(define-fun c () Int (- x 1))"), "syntax_error"),
    ("bound", fenced("5 6"), "syntax_error"),
    ("bound", fenced("5.0"), "syntax_error"),
    ("inv", fenced("(define-fun inv ((i Int) (n Int)) Bool true)"), "wrong_answer"),
    ("inv", fenced("(define-fun inv ((i Int) (n Int)) Bool false)"), "wrong_answer"),
    ("inv", fenced("(define-fun start ((i Int) (n Int)) Bool false)"), "missing_entry_point"),
    ("bits", fenced("(define-fun low ((v (_ BitVec 8))) (_ BitVec 8) v)"), "wrong_answer"),
    ("bits", fenced("(define-fun low ((v (_ BitVec 8))) (_ BitVec 8) #b1)"), "syntax_error"),
    (
        "bits",
        fenced("(define-fun low ((v (_ BitVec 8))) (_ BitVec 8) (_ bv256 8))"),
        "syntax_error",
    ),
    ("bits", fenced("(define-fun low ((v (_ BitVec 900))) (_ BitVec 8) #x01)"), "forbidden"),
    ("mean", "(a + b) / 3", "wrong_answer"),
    ("mean", "(a + b) * 1 / (a - a)", "wrong_answer"),
    ("mean", "x + (y - x) / 2", "no_answer"),
    ("mean", "__import__('os').system('true')", "forbidden"),
    ("mean", fenced("(lambda a, b: a)(a, b)"), "forbidden"),
    ("mean", fenced("def mean(a, b):\n    import os\n    return a"), "forbidden"),
    ("mean", fenced("def mean(a, b):\n    while True: pass"), "forbidden"),
    ("mean", fenced("@abs\ndef mean(a, b):\n    return (a + b) / 2"), "forbidden"),
    ("mean", fenced("def mean(a, b=0):\n    return (a + b) / 2"), "forbidden"),
    ("mean", fenced("def mean(*a):\n    return a"), "forbidden"),
    ("mean", fenced("def mean(a):\n    return a"), "missing_entry_point"),
    ("mean", fenced("def average(a, b):\n    return (a + b) / 2"), "missing_entry_point"),
    ("mean", fenced("def mean(a, b):\n    if a > b:\n        return a"), "forbidden"),
    ("mean", fenced("def abs(a, b): return a\ndef mean(a, b): return a"), "forbidden"),
    ("mean", fenced("def mean(abs, b): return (abs + b) / 2"), "forbidden"),
    ("mean", fenced("mean(a, b)"), "forbidden"),
    ("mean", fenced("a if True else b"), "wrong_answer"),
    ("mean", fenced("float('nan')"), "forbidden"),
    ("mean", fenced("1e999"), "forbidden"),
    ("mean", fenced("10 ** 10 ** 10"), "forbidden"),
    ("mean", fenced("2 ** a"), "forbidden"),
    ("mean", fenced("a and b"), "syntax_error"),
    ("mean", fenced("(a < b) + a"), "syntax_error"),
    ("mean", fenced("True"), "syntax_error"),
    ("mean", fenced("[a, b][0]"), "forbidden"),
    ("mean", fenced("a.real"), "forbidden"),
    ("mean", fenced("(a := b)"), "forbidden"),
    ("mean", fenced("f'{a}'"), "forbidden"),
    ("mean", fenced("a +" + "(" * 250 + "b" + ")" * 250), "syntax_error"),
    ("mean", fenced("-" * 3000 + "a"), "forbidden"),
    ("mean", fenced("+".join(["a"] * 1500)), "forbidden"),
    ("mean", fenced("\uff41"), "forbidden"),
    ("rem", "a - b * (a // b) if b > 0 else 0", "wrong_answer"),
    ("rem", "a % 0", "wrong_answer"),
    ("rem", "a % abs(b)", "wrong_answer"),
]


def proof_task(checks):
    return Task("proof", "proof_test", 0.5, "Prove it.", "", f"test:{checks.goal}", checks=checks)


@pytest.fixture(scope="module")
def judged():
    """{(checks, completion): verdict} of both tables, judged together."""
    cases = [(CHECKS[name], text) for name, text, *_ in (*HONEST, *WRONG)]
    return dict(zip(cases, judge_all(cases), strict=True))


def judge_all(cases, finish_reason="stop"):
    async def run():
        workers = Workers(count=2)
        judge = ProofJudge(workers)
        try:
            await judge.start()
            return await asyncio.gather(
                *(
                    judge.judge(
                        proof_task(checks), Completion((), (), text, finish_reason), Limits(4.0)
                    )
                    for checks, text in cases
                )
            )
        finally:
            await judge.close()
            await workers.close()

    return asyncio.run(run())


@needs_z3
@pytest.mark.parametrize(("name", "text"), HONEST)
def test_honest_answers_pass(judged, name, text):
    verdict = judged[CHECKS[name], text]
    assert (verdict.outcome, verdict.reward) == (Outcome.PASS, 1.0), verdict
    assert verdict.value_correct
    assert verdict.method


@needs_z3
@pytest.mark.parametrize(("name", "text", "category"), WRONG)
def test_wrong_and_cheating_answers_fail_with_their_category(judged, name, text, category):
    verdict = judged[CHECKS[name], text]
    assert (verdict.outcome, verdict.category) == (Outcome.FAIL, category), verdict
    assert verdict.reward < 1.0
    assert not verdict.value_correct
    assert bool(verdict.method) is (category != "no_answer")


@needs_z3
def test_a_counter_example_is_named_and_shown_goals_earn_a_part(judged):
    verdict = judged[CHECKS["max2"], max2("a")]
    assert verdict.detail.startswith("counter-example: x = ")
    assert verdict.reward == pytest.approx(2 / 3)


@needs_z3
def test_what_the_solver_cannot_decide_is_a_timeout_and_the_same_each_time():
    cubes = """
    (declare-fun f (Int) Int)
    (declare-const x Int) (declare-const y Int) (declare-const z Int)
    (assert (and (> x 0) (> y 0) (> z 0)))
    (assert (distinct (+ (* x x x) (* y y y)) (* (f z) (f z) (f z))))
    """
    text = fenced("(define-fun f ((n Int)) Int n)")
    verdicts = judge_all([(smtlib(cubes), text)] * 3)
    assert {(v.outcome, v.category) for v in verdicts} == {(Outcome.FAIL, "timeout")}


@needs_z3
def test_contradicting_assumptions_judge_nobody():
    goal = BOUND + "(assert (< x 0))"
    (verdict,) = judge_all([(smtlib(goal), "11")])
    assert verdict.outcome is Outcome.ERROR
    assert "contradict" in verdict.detail


class BrokenWorkers:
    def __init__(self, answer):
        self.answer = answer

    async def ask(self, method, case, wall_s, memory_mb):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "outcome", "category"),
    [
        (Answer(None, detail="worker ended"), Outcome.ERROR, ""),
        (Answer(None, "timeout"), Outcome.FAIL, "timeout"),
        (Answer(None, "memory_limit"), Outcome.FAIL, "memory_limit"),
        (Answer({"goals": []}), Outcome.ERROR, ""),
        (Answer({}), Outcome.ERROR, ""),
    ],
)
def test_a_broken_worker_is_not_the_students_doing(answer, outcome, category):
    judge = ProofJudge(BrokenWorkers(answer))
    case = judge.judge(proof_task(CHECKS["bound"]), Completion((), (), "5", "stop"), Limits())
    verdict = asyncio.run(case)
    assert (verdict.outcome, verdict.category) == (outcome, category)


@pytest.mark.parametrize(
    "checks",
    [
        smtlib("(declare-fun f () Int)"),  # nothing to show
        smtlib("(declare-const x Int)(assert (> x 0))"),  # nothing asked
        smtlib("(declare-fun f () Int)(declare-fun g () Int)(assert (> f g))"),
        smtlib("(declare-fun f () Int)(assert (> f 0))(check-sat)"),
        smtlib("(declare-fun f () Int)(declare-const f Int)(assert (> f 0))"),
        smtlib("(declare-fun f () Int)(assert (forall ((x Int)) (> f x)))"),
        smtlib("(declare-fun f () String)(assert (= f f))"),
        properties("f(x)", "{}"),
        properties("x > 0", MEAN),
        properties("mean(x, y)", MEAN),
        properties("mean(x) > 0", MEAN),
        properties("", MEAN),
        properties("mean(x, y) > 0", MEAN.replace('"x < y"', '"mean(x, y) < y"')),
        properties("mean(x, y) > 0", MEAN.replace('"x": "Real"', '"mean": "Real"')),
        properties("mean(x, y) > 0", "[" * 5000),
    ],
)
def test_a_task_that_cannot_be_read_is_an_error(checks):
    judge = ProofJudge(BrokenWorkers(Answer({"goals": [{"status": "valid", "detail": ""}]})))
    case = judge.judge(proof_task(checks), Completion((), (), "5", "stop"), Limits())
    verdict = asyncio.run(case)
    assert (verdict.outcome, verdict.detail[:5]) == (Outcome.ERROR, "task:")


def test_an_answer_that_may_be_cut_does_not_count():
    judge = ProofJudge(BrokenWorkers(Answer({"goals": [{"status": "valid", "detail": ""}]})))

    def judge_cut(text):
        completion = Completion((), (), text, "length")
        return asyncio.run(judge.judge(proof_task(CHECKS["bound"]), completion, Limits()))

    assert judge_cut("5").category == "truncated"
    assert judge_cut("```\n5").category == "truncated"
    assert judge_cut("```\n5\n```\nThis is").outcome is Outcome.PASS


def test_divisions_are_guarded_by_what_decides_before_them():
    goals = smt_text.read_goals("(declare-fun f (Int) Bool)(declare-const x Int)(assert (f x))")

    def condition(body):
        answer = smt_text.read_answer(f"(define-fun f ((n Int)) Bool {body})", goals.asked)
        return str(definedness(answer.body, frozenset()))

    assert condition("(> n 0)") == "None"
    assert condition("(> (div 6 n) 0)") == "(not (= v.n 0))"
    assert condition("(or (= n 0) (> (div 6 n) 0))") == "(or (= v.n 0) (not (= v.n 0)))"
    assert condition("(and (> n 0) (> (div 6 n) 0))") == "(or (not (> v.n 0)) (not (= v.n 0)))"
    assert condition("(let ((z n)) (= 1 (mod 1 z)))") == "(let ((v.z v.n)) (not (= v.z 0)))"


TOKENS = st.sampled_from(
    [
        *(
            "(",
            ")",
            "define-fun",
            "max2",
            "a",
            "b",
            "Int",
            "let",
            "ite",
            "+",
            "_",
            "bv1",
            "8",
            "1.5",
        ),
        *(
            "#b1",
            "|",
            '"',
            ";",
            "\n",
            "forall",
            "assert",
            "(a Int)",
            "(b Int)",
            "-1",
            "\x00",
            "\ud800",
        ),
    ]
)


@given(st.lists(TOKENS, max_size=60).map(" ".join) | st.text(max_size=300))
def test_reading_smtlib_refuses_or_gives_a_term(text):
    asked = smt_text.read_goals(MAX2).asked
    for read in (lambda: smt_text.read_answer(text, asked), lambda: smt_text.read_goals(text)):
        try:
            read()
        except Refusal as refusal:
            assert refusal.category in CATEGORIES


WORDS = st.sampled_from(
    [
        *(
            "a",
            "b",
            "(",
            ")",
            "+",
            "-",
            "//",
            "%",
            "**",
            "2",
            "0.5",
            "if",
            "else",
            "lambda",
            ":",
            "<",
        ),
        *(
            "==",
            "not",
            "and",
            "def mean(a, b):",
            "return",
            "\n",
            "    ",
            "abs",
            ",",
            "[",
            "1j",
            "'",
            "~",
        ),
    ]
)


@given(st.lists(WORDS, max_size=40).map(" ".join) | st.text(max_size=300))
def test_reading_python_refuses_or_gives_a_term(text):
    goals = property_text.read_goals(MEAN_GOAL, MEAN)
    try:
        assert property_text.read_answer(text, goals, MEAN).body.sort == "Real"
    except Refusal as refusal:
        assert refusal.category in CATEGORIES
