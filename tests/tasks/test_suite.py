import ast
import collections
import itertools
import operator
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.config import TasksConfig
from cosr_jax.tasks import make_source
from cosr_jax.tasks.domains import COURSES
from cosr_jax.tasks.skills import INSTRUCTION
from cosr_jax.tasks.splits import SPLITS, Dice, split_of
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import NUM_LEVELS, UserError

SUITE = ProceduralSuite()
CELLS = SUITE.cells()

cells = st.sampled_from(CELLS)
seeds = st.integers(0, 2**31 - 1)
splits = st.sampled_from(SPLITS)


def evaluate(expression):
    """The exact value of a formula of + - * / and brackets, by Python's own grammar."""
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }

    def walk(node):
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return walk(ast.parse(expression.strip(), mode="eval").body)


def question(task):
    assert task.prompt.endswith(f" {INSTRUCTION}")
    return task.prompt.removesuffix(f" {INSTRUCTION}")


def formula(task):
    return re.search(r"[-(\d][-+*/() \d]*[\d)]|\d", question(task))[0]


def solve_arithmetic(task):
    return str(evaluate(formula(task)))


def solve_equation(task):
    left, right = re.search(r"[-\d x+]*x[-\d x+]*=[-\d x+]*\d[x]?", question(task))[0].split("=")

    def side(text, x):
        return evaluate(re.sub(r"(\d*)x", lambda m: f"({m[1] or 1} * {x})", text))

    def gap(x):
        return side(left, x) - side(right, x)

    root = -gap(0) / (gap(1) - gap(0))  # the gap is linear in x
    return str(root)


def solve_sequence(task):
    terms = [int(n) for n in re.findall(r"-?\d+", question(task))]
    steps = [b - a for a, b in itertools.pairwise(terms)]
    growth = {b - a for a, b in itertools.pairwise(steps)}
    if task.level <= 2:
        assert growth == {0}
        return str(terms[-1] + steps[0])
    if task.level == 3:
        assert len({Fraction(b, a) for a, b in itertools.pairwise(terms)}) == 1
        return str(terms[-1] * terms[1] // terms[0])
    if task.level == 4:
        assert len(growth) == 1
        return str(terms[-1] + steps[-1] + growth.pop())
    assert all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:], strict=False))
    return str(terms[-2] + terms[-1])


def solve_sorting(task):
    return ", ".join(map(str, sorted(int(n) for n in re.findall(r"-?\d+", question(task)))))


def solve_counting(task):
    letter = re.search(r"the letter (\w)\b", question(task))[1]
    letters = re.search(r"(?:\b\w ){3,}\w\b", question(task).split("letter " + letter)[-1])
    letters = letters or re.search(r"(?:\b\w ){3,}\w\b", question(task))
    return str(letters[0].split().count(letter))


def solve_units(task):
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
    sizes = seconds | {"months": 1, "years": 12, "grams": 1, "kilograms": 1000}
    sizes |= {"millimetres": 1, "centimetres": 10, "metres": 1000, "kilometres": 1000000}
    sizes |= {"millilitres": 1, "litres": 1000}
    amounts = re.findall(r"(\d+) ([a-z]+)", question(task))
    total = sum(int(number) * sizes[unit] for number, unit in amounts)
    rest = re.sub(r"\d+ [a-z]+", "", question(task))
    (target,) = [word for word in re.findall("[a-z]+", rest) if word in sizes]
    return f"{Fraction(total, sizes[target])} {target}"


SOLVERS = {
    "addition": solve_arithmetic,
    "subtraction": solve_arithmetic,
    "multiplication": solve_arithmetic,
    "division": solve_arithmetic,
    "equations": solve_equation,
    "sequences": solve_sequence,
    "sorting": solve_sorting,
    "counting": solve_counting,
    "units": solve_units,
}


def test_the_grid_is_nine_skills_by_five_levels():
    assert len(CELLS) == len(set(CELLS)) == 9 * NUM_LEVELS
    assert {cell.partition("/")[0] for cell in CELLS} == set(SOLVERS)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_gives_well_made_tasks_in_every_split(cell):
    for split in SPLITS:
        for seed in range(25):
            task = SUITE.draw(cell, seed, split)
            assert task.cell == cell
            assert split_of(task.key) == split
            assert task.answer == SOLVERS[task.skill](task), task.prompt
            boxed = task.answer.partition(" ")[0] if task.skill == "units" else task.answer
            assert task.solution.endswith(f"\\boxed{{{boxed}}}")
            assert task.solution.count("\\boxed") == 1


@settings(max_examples=150)
@given(cells, seeds, splits)
def test_the_same_arguments_give_the_same_task(cell, seed, split):
    assert SUITE.draw(cell, seed, split) == ProceduralSuite().draw(cell, seed, split)


@settings(max_examples=150)
@given(cells, seeds, seeds)
def test_no_question_is_in_two_splits(cell, seed, other_seed):
    keys = [{SUITE.draw(cell, s, split).key for s in (seed, other_seed)} for split in SPLITS]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_draws_never_change_between_releases():
    # Probe hashes in old reports stay comparable only as long as these hold.
    task = SUITE.draw("addition/2", 0, "test")
    assert (task.prompt, task.key) == (
        "What is 55 + 18? Put the final answer in \\boxed{}.",
        "addition:55+18",
    )
    assert Dice("a", 1).between(0, 999) == 908


@settings(max_examples=200)
@given(
    st.sampled_from([f"{s}/{n}" for s in ("addition", "multiplication") for n in range(1, 6)]),
    seeds,
)
def test_swapped_operands_are_the_same_question(cell, seed):
    task = SUITE.draw(cell, seed, "train")
    operands = [int(n) for n in re.findall(r"\d+", formula(task))]
    assert sorted(operands, reverse=True) == [int(n) for n in re.findall(r"\d+", task.key)]


def test_both_orders_of_a_sum_are_asked():
    asked = {formula(SUITE.draw("addition/1", seed, "train")) for seed in range(600)}
    swapped = {" + ".join(reversed(text.split(" + "))) for text in asked}
    assert len(asked & swapped) > 0.9 * len(asked)


@pytest.mark.parametrize("skill", SOLVERS)
def test_levels_of_a_skill_share_no_question(skill):
    seen = {}
    for level in range(1, NUM_LEVELS + 1):
        for seed in range(150):
            key = SUITE.draw(f"{skill}/{level}", seed, "train").key
            assert seen.setdefault(key, level) == level


@pytest.mark.parametrize("cell", CELLS)
def test_questions_and_wordings_vary(cell):
    tasks = [SUITE.draw(cell, seed, "train") for seed in range(60)]
    assert len({task.key for task in tasks}) >= 15
    assert len({task.prompt for task in tasks}) >= 25
    frames = {re.sub(r"[-+*/(), \d]+|\b[a-z]\b", " ", task.prompt) for task in tasks}
    assert len(frames) >= 2


@pytest.mark.parametrize("level", (1, 2, 3))
@pytest.mark.parametrize("skill", SOLVERS)
def test_worked_answers_of_low_levels_are_short(skill, level):
    # Digits, words, signs, and blanks before digits count; \boxed{ is "\", "box", "ed", "{".
    pieces = r"\d|[A-Za-z]+|[^\sA-Za-z\d]| (?=\d)"
    for seed in range(100):
        solution = SUITE.draw(f"{skill}/{level}", seed, "train").solution
        assert len(re.findall(pieces, solution)) + 1 + 1 <= 24, solution  # "ed", end of turn


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_is_blind_to_the_last_digit(split):
    # A split by formula once held only sums that end in 0.
    draws = 3000
    digits = collections.Counter(
        SUITE.draw("addition/2", seed, split).answer[-1] for seed in range(draws)
    )
    chi_squared = sum((digits[d] - draws / 10) ** 2 / (draws / 10) for d in "0123456789")
    assert chi_squared < 60, digits  # the questions of a split are finite, so not quite uniform


def test_the_splits_have_their_shares():
    counts = collections.Counter(split_of(f"addition:{n}+0") for n in range(20000))
    for split, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        assert abs(counts[split] / 20000 - share) < 0.015


@given(seeds)
def test_dice_shuffle_keeps_all_items_and_reach_both_ends(seed):
    dice = Dice(seed)
    assert sorted(dice.shuffled(range(7))) == list(range(7))
    assert {dice.between(3, 5) for _ in range(200)} == {3, 4, 5}


def test_low_subtractions_stay_non_negative_and_level_four_is_negative():
    for seed in range(100):
        assert all(
            int(SUITE.draw(f"subtraction/{n}", seed, "train").answer) >= 0 for n in (1, 2, 3)
        )
        assert int(SUITE.draw("subtraction/4", seed, "train").answer) < 0


def test_sorting_is_never_solved_by_copying():
    for cell in [f"sorting/{n}" for n in range(1, 6)]:
        for seed in range(60):
            task = SUITE.draw(cell, seed, "train")
            assert task.answer not in task.prompt


def test_source_is_limited_by_the_config():
    source = make_source(TasksConfig(skills=("units", "addition"), max_level=2))
    assert source.cells() == ("units/1", "units/2", "addition/1", "addition/2")


def test_one_source_draws_from_all_domains_of_the_config():
    source = make_source(TasksConfig(domains=("code", "math"), max_level=1))
    drawn = [source.draw(cell, 0, "train") for cell in source.cells()]
    assert [task.cell for task in drawn] == list(source.cells())
    assert [task.domain for task in drawn] == ["code"] * 10 + ["math"] * 9
    names = [skill for course in COURSES.values() for skill in course.skills]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_source(TasksConfig(skills=("additon",))), ("additon", "mean addition")),
        (lambda: make_source(TasksConfig(domains=("maths",))), ("maths", "mean math")),
        (lambda: make_source(TasksConfig(domains=())), ("config.tasks.domains",)),
        (lambda: make_source(TasksConfig(skills=("py_loops",))), ("py_loops", "run's domains")),
        (lambda: SUITE.draw("addition/6", 0, "train"), ("addition/6", "mean addition/")),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="dev"):
        SUITE.draw("addition/1", 0, "dev")


def test_a_cell_without_questions_in_a_split_says_so(monkeypatch):
    monkeypatch.setattr("cosr_jax.tasks.suite.split_of", lambda key: "train")
    with pytest.raises(UserError, match=r"addition/1 has no question in split test"):
        ProceduralSuite().draw("addition/1", 0, "test")
