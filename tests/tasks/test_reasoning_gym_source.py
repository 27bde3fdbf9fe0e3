import dataclasses
import enum
import itertools
import json
import random
import sys
import types

import pytest

from cosr_jax.config import TasksConfig
from cosr_jax.protocols import TaskSource
from cosr_jax.tasks import make_source
from cosr_jax.tasks.probes import build_probes
from cosr_jax.tasks.reasoning_gym_source import ReasoningGymSource
from cosr_jax.tasks.splits import SPLITS, split_of
from cosr_jax.types import Task, UserError


@dataclasses.dataclass
class FakeConfig:
    min_value: int
    max_value: int
    num_terms: int
    seed: int | None = None
    size: int = 500


class FakeCurriculum:
    """Two attributes: a range of four steps and a number of six."""

    def __init__(self):
        self.attributes = {
            "value": types.SimpleNamespace(name="value", levels=[10, 100, 1000, 10000]),
            "terms": types.SimpleNamespace(name="terms", levels=[2, 3, 4, 5, 6, 7]),
        }
        self.at = {}

    def set_attr_level(self, name, level):
        assert 0 <= level < len(self.attributes[name].levels)
        self.at[name] = level

    def generate_configuration(self, context):
        top = self.attributes["value"].levels[self.at["value"]]
        low = top // 10 if context.mode is RangeMode.UPPER_BOUND else 0
        return FakeConfig(low, top - 1, self.attributes["terms"].levels[self.at["terms"]])


class RangeMode(enum.Enum):
    UPPER_BOUND = "upper_bound"
    INCLUSIVE = "inclusive"


def chain_sum(rng, min_value, max_value, num_terms):
    numbers = [rng.randint(min_value, max_value) for _ in range(num_terms)]
    expression = str(numbers[0])
    for number in numbers[1:]:
        expression += f" {rng.choice('+-')} {number}"
    wording = rng.choice(("Calculate {}", "Solve: {}"))
    return wording.format(expression), str(eval(expression)), {"expression": expression}


def gsm_symbolic(rng):
    number = rng.randint(0, 400)
    answer = str(number) if number % 2 else f"{number} apples"
    return f"How many are {number}? ", answer, {}


def word_sorting(rng):
    words = [rng.choice("abcdefgh") * 3 for _ in range(4)]
    metadata = {"words": words, "difficulty": {"count": (4, 4)}}
    return f"Sort: {', '.join(words)}", ", ".join(sorted(words)), metadata


@pytest.fixture
def gym(monkeypatch):
    """A stand-in for the package; counts the seeds it is asked for."""
    makers = {
        "chain_sum": chain_sum,
        "gsm_symbolic": gsm_symbolic,
        "word_sorting": word_sorting,
    }
    seeds = []

    def create_dataset(name, *, seed, size, **settings):
        seeds.append(seed)
        items = []
        for index in range(size):
            question, answer, metadata = makers[name](random.Random(seed + index), **settings)
            items.append({"question": question, "answer": answer, "metadata": metadata})
        return items

    modules = {
        "reasoning_gym": {"create_dataset": create_dataset, "__path__": []},
        "reasoning_gym.factory": {
            "CURRICULA": {"chain_sum": FakeCurriculum},
            "create_curriculum": lambda name: FakeCurriculum(),
        },
        "reasoning_gym.coaching": {"__path__": []},
        "reasoning_gym.coaching.base_curriculum": {
            "RangeAttributeMode": RangeMode,
            "DefaultCurriculumContext": lambda mode: types.SimpleNamespace(mode=mode),
        },
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(seeds=seeds)


SKILLS = ("chain_sum", "gsm_symbolic")


def test_cells_follow_the_curricula(gym):
    source: TaskSource = make_source(TasksConfig(source="reasoning_gym", skills=SKILLS))
    assert source.cells() == (*(f"chain_sum/{n}" for n in range(1, 6)), "gsm_symbolic/3")
    assert ReasoningGymSource(("chain_sum",), max_level=2).cells() == ("chain_sum/1", "chain_sum/2")


def test_draws_are_pure_and_split_by_content(gym):
    source, again = ReasoningGymSource(SKILLS), ReasoningGymSource(SKILLS)
    for cell in source.cells():
        for seed in range(20):
            tasks = [source.draw(cell, seed, split) for split in SPLITS]
            assert tasks == [again.draw(cell, seed, split) for split in SPLITS]
            assert [split_of(task.key) for task in tasks] == list(SPLITS)
            assert all(task.cell == cell and task.source == "reasoning_gym" for task in tasks)
            assert all(task.solution == f"\\boxed{{{task.answer}}}" for task in tasks)
            assert all(
                task.prompt.endswith(" Put the final answer in \\boxed{}.") for task in tasks
            )


def test_neighbouring_draws_use_far_seeds(gym):
    source = ReasoningGymSource(("chain_sum",))
    for seed in range(200):
        source.draw("chain_sum/2", seed, "train")
    ordered = sorted(set(gym.seeds))
    assert len(ordered) == len(gym.seeds)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 1


def test_order_and_wording_do_not_make_a_new_problem(gym):
    source = ReasoningGymSource(("chain_sum",))
    orders = {}
    for split in SPLITS:
        for seed in range(300):
            task = source.draw("chain_sum/1", seed, split)
            digits = "".join(c for c in task.prompt if c in "0123456789+-")
            if "+" in digits:
                orders.setdefault("+".join(sorted(digits.split("+"))), set()).add(task.key)
    assert orders and all(len(keys) == 1 for keys in orders.values())


def test_answers_that_are_not_plain_numbers_are_passed_over(gym):
    source = ReasoningGymSource(("gsm_symbolic",))
    assert all(source.draw("gsm_symbolic/3", s, "train").answer.isdecimal() for s in range(50))


def test_hard_levels_hold_no_easy_problems(gym):
    source = ReasoningGymSource(("chain_sum",))
    for seed in range(30):
        expression = source.draw("chain_sum/3", seed, "train").key.partition(":")[2]
        assert [len(term.lstrip("-")) for term in expression.split()] == [3, 3, 3, 3]


def test_probes_of_a_small_generator_are_distinct(gym):
    source = ReasoningGymSource(("gsm_symbolic",))
    probes = build_probes(source, "p", [("*", 1000)], "test")
    assert 0 < len(probes.tasks) < 120
    assert len({task.key for task in probes.tasks}) == len(probes.tasks)
    assert probes.shortfalls == (("gsm_symbolic/3", 1000, len(probes.tasks)),)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReasoningGymSource(("chain_sums",)), "did you mean chain_sum?"),
        (lambda: ReasoningGymSource(("knights_knaves",)), "generator offered here"),
        (lambda: ReasoningGymSource(("gsm_symbolic",), max_level=2), "has level 3 only"),
        (lambda: ReasoningGymSource(("chain_sum",)).draw("chain_sum/6", 0, "train"), "chain_sum/6"),
    ],
)
def test_bad_names_are_refused(gym, make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


def test_unknown_split_is_refused(gym):
    with pytest.raises(ValueError, match="dev"):
        ReasoningGymSource(("chain_sum",)).draw("chain_sum/1", 0, "dev")


def test_an_empty_split_is_reported(gym, monkeypatch):
    monkeypatch.setattr("cosr_jax.tasks.reasoning_gym_source.split_of", lambda key: "train")
    with pytest.raises(UserError, match="chain_sum/1 has no problem in split test"):
        ReasoningGymSource(("chain_sum",)).draw("chain_sum/1", 0, "test")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if not installed
    with pytest.raises(UserError, match=r'pip install "cosr-jax\[tasks\]"'):
        ReasoningGymSource(("chain_sum",))


def test_a_package_broken_inside_is_not_called_missing(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'pycosat'", name="pycosat")

    monkeypatch.setattr(
        "cosr_jax.tasks.reasoning_gym_source.importlib", types.SimpleNamespace(import_module=broken)
    )
    with pytest.raises(ModuleNotFoundError, match="pycosat"):
        ReasoningGymSource(("chain_sum",))


def test_scored_generators_bring_their_item(gym):
    source = ReasoningGymSource(domains=("gym",), skills=("word_sorting",))
    for seed in range(20):
        task = source.draw("word_sorting/3", seed, "train")
        item = json.loads(task.checks.item)
        assert (task.domain, task.checks.generator) == ("gym", "word_sorting")
        assert item["answer"] == ", ".join(sorted(item["metadata"]["words"]))
        assert task.solution == f"<answer>{item['answer']}</answer>"
        assert task.prompt.endswith("\n\nPut the final answer between <answer> and </answer>.")
        assert split_of(task.key) == "train"
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("domains", "skills", "words"),
    [
        (("maths",), (), "did you mean math?"),
        ((), (), "names no domain"),
        (("math",), ("word_sorting",), "generator offered here"),
        (("gym",), ("chain_sum",), "generator offered here"),
    ],
)
def test_domains_limit_the_generators(gym, domains, skills, words):
    with pytest.raises(UserError) as error:
        ReasoningGymSource(skills, domains=domains)
    assert words in str(error.value)


@pytest.mark.slow
def test_every_offered_generator_works_in_the_real_package():
    source = ReasoningGymSource(domains=("math", "gym"))
    cells = source.cells()
    assert {"chain_sum/5", "gcd/4", "gsm_symbolic/3", "leg_counting/5", "word_sorting/5"} <= set(
        cells
    )
    for cell in cells:
        for split in SPLITS:
            for seed in range(3):
                task = source.draw(cell, seed, split)
                assert task == source.draw(cell, seed, split)
                assert split_of(task.key) == split and task.cell == cell
                assert task.key.partition(":")[2]
                if task.skill in ("chain_sum", "products"):
                    joined = task.key.partition(":")[2].replace(" ", " + ")
                    assert str(eval(joined)) == task.answer
