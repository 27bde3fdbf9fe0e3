import re

import pytest
from programs import mutants, passed, solves

from cosr_jax.tasks.code_problems import fenced, unfenced
from cosr_jax.tasks.code_skills import CODE
from cosr_jax.tasks.skills import MATH_SKILLS
from cosr_jax.tasks.splits import SPLITS, split_of
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import NUM_LEVELS, CodeChecks

SUITE = ProceduralSuite(domains=("code",))
CELLS = SUITE.cells()


def tasks_of(cell, count=12, split="train"):
    return [SUITE.draw(cell, seed, split) for seed in range(count)]


def test_the_grid_is_ten_skills_by_five_levels():
    assert len(CELLS) == len(CODE.skills) * NUM_LEVELS == 50
    assert not CODE.skills.keys() & MATH_SKILLS.keys()


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_gives_well_made_tasks_in_every_split(cell):
    for split in SPLITS:
        for task in tasks_of(cell, 8, split):
            assert (task.domain, task.cell, task.answer) == ("code", cell, "")
            assert split_of(task.key) == split
            assert task.prompt.endswith(f" {CODE.instruction}")
            assert isinstance(task.checks, CodeChecks) and not task.checks.io
            name = task.checks.entry_point
            assert re.search(rf"`{name}\b", task.prompt)
            assert all(re.search(rf"\b{name}\(", test) for test in task.checks.tests)
            assert len(set(task.checks.tests)) == len(task.checks.tests) >= 3
            assert SUITE.draw(cell, 0, split) == SUITE.draw(cell, 0, split)


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_passes_and_programs_that_do_nothing_fail(cell):
    for task in tasks_of(cell):
        source, name = unfenced(task.solution), task.checks.entry_point
        assert solves(source, task), task.prompt
        for idle in ("", f"{name} = None", f"def {name}(*args, **kwargs):\n    pass"):
            assert not solves(idle, task)


@pytest.mark.parametrize("cell", CELLS)
def test_programs_that_are_wrong_in_one_place_fail(cell):
    caught, total = 0, 0
    for task in tasks_of(cell, 6):
        verdicts = [solves(wrong, task) for wrong in mutants(task)]
        assert False in verdicts or not verdicts
        caught += verdicts.count(False)
        total += len(verdicts)
    # A few mutants do the same as the reference, e.g. a stack one larger that is never full.
    assert caught >= 0.9 * total, (caught, total)


@pytest.mark.parametrize("skill", CODE.skills)
def test_levels_share_no_question(skill):
    seen = {}
    for level in range(1, NUM_LEVELS + 1):
        for task in tasks_of(f"{skill}/{level}", 60):
            assert seen.setdefault(task.key, level) == level


@pytest.mark.parametrize("cell", CELLS)
def test_questions_wordings_and_names_vary(cell):
    tasks = tasks_of(cell, 60)
    assert len({task.key for task in tasks}) >= 30
    assert len({task.checks.entry_point for task in tasks}) >= 4
    assert len({re.sub(r"`.*|\d+", "", task.prompt) for task in tasks}) >= 2


def test_the_key_knows_neither_names_nor_wording():
    by_key = {}
    for task in tasks_of("py_strings/1", 400):
        by_key.setdefault(task.key, set()).add(task.prompt)
    assert max(map(len, by_key.values())) >= 3


@pytest.mark.parametrize("skill", [s for s in CODE.skills if s != "py_classes"])
@pytest.mark.parametrize("level", (1, 2, 3))
def test_worked_answers_of_low_levels_are_short(skill, level):
    # Digits, words and signs count, a line's indentation once.
    pieces = r"\d|[A-Za-z_]+|[^\sA-Za-z_\d]+|\n +"
    for task in tasks_of(f"{skill}/{level}"):
        assert len(re.findall(pieces, task.solution)) <= 55, task.solution


def test_high_levels_show_one_test_and_low_ones_none():
    for cell in CELLS:
        for task in tasks_of(cell, 4):
            shown = [t for t in task.checks.tests if t.split(" == ")[-1] in task.prompt]
            is_shown = "For example" in task.prompt
            assert is_shown == (task.level >= 4 and task.skill != "py_classes")
            assert not is_shown or task.checks.tests[0] in shown


# --- what the words say, read again without looking at the reference ------------------------------

COMPARE = {
    "greater than": lambda x, c: x > c,
    "less than": lambda x, c: x < c,
    "at least": lambda x, c: x >= c,
    "at most": lambda x, c: x <= c,
    "divisible by": lambda x, c: x % c == 0,
}
COMBINE = {
    "plus": lambda x, c: x + c,
    "minus": lambda x, c: x - c,
    "times": lambda x, c: x * c,
    "divided by": lambda x, c: x // c,
}
SUMMARY = {"sum": sum, "length": len, "largest": max, "smallest": min}
OPERATION = f"({'|'.join(COMBINE)})"
RELATION = f"({'|'.join(COMPARE)})"
N = r"(\d+)"

#: cell -> (pattern of the words, (its groups) -> the function that they describe)
MEANING = {
    "py_formulas/1": (rf"\w+ {OPERATION} {N}", lambda op, c: lambda x: COMBINE[op](x, c)),
    "py_formulas/2": (
        rf"{N} times \w+ {OPERATION} {N}",
        lambda a, op, c: lambda x: COMBINE[op](a * x, c),
    ),
    "py_formulas/3": (
        rf"{N} times x {OPERATION} {N} times y",
        lambda a, op, b: lambda x, y: COMBINE[op](a * x, b * y),
    ),
    "py_formulas/4": (
        rf"{N} times the square of \w+, plus {N} times \w+, {OPERATION} {N}",
        lambda a, b, op, c: lambda x: COMBINE[op](a * x * x + b * x, c),
    ),
    "py_conditions/1": (
        rf"True if \w+ is {RELATION} {N}",
        lambda r, c: lambda x: COMPARE[r](x, c),
    ),
    "py_conditions/3": (
        rf"{N} if \w+ is {RELATION} {N}, and {N} otherwise",
        lambda a, r, c, b: lambda x: a if COMPARE[r](x, c) else b,
    ),
    "py_conditions/5": (
        rf"'(\w+)' if \w+ is divisible by {N} only, '(\w+)' if by {N} only, '(\w+)' if by both",
        lambda one, a, two, b, both: (
            lambda x: {
                (True, True): both,
                (True, False): one,
                (False, True): two,
            }.get((x % a == 0, x % b == 0), x)
        ),
    ),
    "py_aggregates/1": (
        rf"the (sum|length|largest|smallest) [\w ]*? {OPERATION} {N}",
        lambda s, op, c: lambda xs: COMBINE[op](SUMMARY[s](xs), c),
    ),
    "py_aggregates/2": (
        rf"how many numbers in the list \w+ are {RELATION} {N}",
        lambda r, c: lambda xs: len([x for x in xs if COMPARE[r](x, c)]),
    ),
    "py_aggregates/3": (
        rf"the sum of the numbers in the list \w+ that are {RELATION} {N}",
        lambda r, c: lambda xs: sum([x for x in xs if COMPARE[r](x, c)]),
    ),
    "py_aggregates/5": (
        rf"positions begin at {N}, plus {N}",
        lambda c, a: lambda xs: a + sum((c + i) * xs[i] for i in range(len(xs))),
    ),
    "py_mappings/3": (
        rf"but {N} in the place of each that is {RELATION} {N}",
        lambda a, r, c: lambda xs: list(map(lambda x: (x, a)[COMPARE[r](x, c)], xs)),
    ),
    "py_mappings/5": (
        rf"starting from {N}, each as its remainder divided by {N}",
        lambda c, m: lambda xs: [(c + sum(xs[: i + 1])) % m for i in range(len(xs))],
    ),
    "py_filters/2": (
        rf"whose remainder divided by {N} is {N}",
        lambda b, r: lambda xs: list(filter(lambda x: (x - r) % b == 0, xs)),
    ),
    "py_filters/3": (
        rf"that are {RELATION} {N} and divisible by {N}",
        lambda r, c, a: lambda xs: [x for x in xs if COMPARE[r](x, c) and x // a * a == x],
    ),
    "py_filters/5": (
        rf"that are {RELATION} {N}, from largest to smallest, each plus {N}",
        lambda r, c, b: lambda xs: sorted({x + b for x in xs if COMPARE[r](x, c)})[::-1],
    ),
    "py_strings/3": (
        r"with every '(\w)' replaced by '(\w)'",
        lambda old, new: lambda s: new.join(s.split(old)),
    ),
    "py_strings/5": (
        r"character that is in '(\w+)' written twice",
        lambda group: lambda s: re.sub(f"([{group}])", r"\1\1", s[::-1]),
    ),
    "py_loops/1": (
        rf"the sum of k (times|plus) {N} over all integers k from 1",
        lambda op, c: lambda n: n * (n + 1) // 2 * c if op == "times" else n * (n + 1) // 2 + n * c,
    ),
    "py_loops/3": (
        rf"(sum|how many).* divisible by {N} (or|and) by {N}",
        lambda s, a, word, b: (
            lambda n: (sum if s == "sum" else len)(
                [
                    k
                    for k in range(1, n + 1)
                    if (k % a == 0) + (k % b == 0) >= (1 if word == "or" else 2)
                ]
            )
        ),
    ),
    "py_loops/5": (
        rf"starts with {N}, {N}, where each later term is {N} times the one before plus {N} times",
        lambda a, b, p, q: lambda n: _recurrence(a, b, p, q, n),
    ),
    "py_dictionaries/1": (
        rf"the key '(\w+)' in the dictionary \w+, or {N} without",
        lambda word, c: lambda d: {word: c, **d}[word],
    ),
}


def _recurrence(a, b, p, q, n):
    terms = [a, b]
    while len(terms) <= n:
        terms.append(p * terms[-1] + q * terms[-2])
    return terms[n]


@pytest.mark.parametrize("cell", MEANING)
def test_tests_hold_for_what_the_words_say(cell):
    pattern, meaning = MEANING[cell]
    for task in tasks_of(cell, 20, "test"):
        groups = re.search(pattern, task.prompt).groups()
        function = meaning(*(int(g) if g.isdigit() else g for g in groups))
        for test in task.checks.tests:
            exec(test, {task.checks.entry_point: function})


# --- code blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "x = 1", "x = 1\n", "\n\nx = '''\n```\n'''\n"])
def test_fences_come_off_again(source):
    assert unfenced(fenced(source)) == source


@pytest.mark.parametrize("text", ["x = 1", "```python\nx = 1", "x = 1\n```", "```py\nx = 1\n```"])
def test_what_is_no_block_is_refused(text):
    with pytest.raises(ValueError, match="no Python code block"):
        unfenced(text)


def test_the_helper_notices_failures():
    tests = ("assert f(1) == 2", "assert f(2) == 3", "assert g()")
    assert [*passed("def f(x): return 2", tests)] == [True, False, False]
    assert [*passed("def f(x) return", tests)] == [False] * 3
