"""Problems from reasoning-gym (pip install "cosr-jax[tasks]"), made safe for held-out evaluation.

Two things are different from using the package directly
(https://github.com/open-thought/reasoning-gym):

* Its item i of seed s is item i - 1 of seed s + 1 for nearly all generators, and small generators
  repeat themselves under any seed.  Here every draw has its own seed from a hash, and the split is
  decided by the hash of the problem's content.
* Generators with plain numbers as answers make tasks of domain "math", which the maths verifier
  compares.  Others make tasks of domain "gym", judged by the package's own scorers.  Those pay for
  answers buried in text, and some for garbage, or run what they are given: only generators whose
  scorers were found to do nothing of that are offered (in version 0.1.25), and the gym verifier
  checks them again on every item.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from cosr_jax.tasks.skills import INSTRUCTION
from cosr_jax.tasks.splits import SPLITS, Dice, split_of
from cosr_jax.tasks.suite import check_known
from cosr_jax.types import NUM_LEVELS, ScorerChecks, Task, UserError, level_difficulty

#: Small generators hold few problems; see suite._MAX_TRIES.
_MAX_TRIES = 500

_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")

#: A generator without a curriculum has one level.
_LONE_LEVEL = 3

Item = Mapping[str, Any]  # reasoning-gym's {"question", "answer", "metadata"}


def _question(item: Item) -> str:
    return " ".join(item["question"].casefold().split())


def _sum(item: Item) -> str:
    """A chain of + and - with its terms in order of size: a + b and b + a are one problem."""
    terms = re.findall(r"[+-]?\d+", item["metadata"]["expression"].replace(" ", ""))
    return " ".join(map(str, sorted(map(int, terms), reverse=True)))


def _product(item: Item) -> str:
    factors = item["metadata"]["expression"].split("*")
    return "*".join(map(str, sorted(map(int, factors), reverse=True)))


def _numbers(item: Item) -> str:
    return ",".join(map(str, sorted(item["metadata"]["numbers"], reverse=True)))


def _field(*names: str) -> Callable[[Item], str]:
    return lambda item: " ".join(str(item["metadata"][name]) for name in names)


def _animals(item: Item) -> str:
    return str(sorted(item["metadata"]["animals"].items()))


#: What a generator's problem asks, stripped of wording and of the order that does not matter.
_NUMBERS: dict[str, Callable[[Item], str]] = {
    "chain_sum": _sum,
    "products": _product,
    "gcd": _numbers,
    "lcm": _numbers,
    "simple_equations": _field("equation"),
    "letter_counting": _question,
    "count_bits": _field("number"),
    "count_primes": _field("start", "end"),
    "leg_counting": _animals,
    "gsm_symbolic": _question,
}
_SCORED: dict[str, Callable[[Item], str]] = dict.fromkeys(
    (
        *("ab", "base_conversion", "binary_alternation", "calendar_arithmetic", "cryptarithm"),
        *("dice", "family_relationships", "list_functions", "manipulate_matrix", "mini_sudoku"),
        *("palindrome_generation", "path_star", "rotate_matrix", "sentence_reordering"),
        *("shortest_path", "string_splitting", "string_synthesis", "tower_of_hanoi"),
        *("word_sequence_reversal", "word_sorting"),
    ),
    _question,
)
_OFFERED = {"math": _NUMBERS, "gym": _SCORED}

#: Ends every prompt of domain "gym": answers may have many lines, and braces of their own.
SCORED_INSTRUCTION = "Put the final answer between <answer> and </answer>."


class ReasoningGymSource:
    """A ``TaskSource`` over generators of reasoning-gym; a cell is generator/level.

    Level n is step n of the generator's curriculum, all its attributes moving together and each
    stopping at its last step.

    Args:
      skills: generators to draw from; empty: all that the domains offer.
      max_level: hardest level to draw.
      domains: "math", "gym", or both.

    Raises:
      UserError: reasoning-gym is not installed, a domain or generator is not offered, or no cell is
        left.
    """

    def __init__(
        self,
        skills: Collection[str] = (),
        max_level: int = NUM_LEVELS,
        domains: Collection[str] = ("math",),
    ):
        if not domains:
            raise UserError("config.tasks.domains: names no domain", "write e.g. ('math', 'gym')")
        for domain in domains:
            check_known(domain, _OFFERED, "config.tasks.domains", "domain of reasoning-gym")
        self._content = {n: _OFFERED[d][n] for d in domains for n in _OFFERED[d]}
        for skill in skills:
            check_known(skill, self._content, "config.tasks.skills", "generator offered here")
        self._gym = _import("reasoning_gym")
        self._factory = _import("reasoning_gym.factory")
        self._settings: dict[str, dict[str, Any]] = {}
        for name in skills or self._content:
            for level, settings in self._levels(name).items():
                if level <= max_level:
                    self._settings[f"{name}/{level}"] = settings
        if not self._settings:
            raise UserError(
                f"config.tasks.max_level: {max_level} leaves no cell of {', '.join(skills)}",
                f"{', '.join(skills)} has level {_LONE_LEVEL} only",
            )

    def cells(self) -> tuple[str, ...]:
        """All cells that the source can draw from, e.g. ``"chain_sum/2"``."""
        return tuple(self._settings)

    def draw(self, cell: str, seed: int, split: str) -> Task:
        """Draws one task; the same arguments and package version always give the same task.

        In domain "math", items whose answer is not a plain number are passed over, like those of
        other splits.

        Raises:
          UserError: there is no such cell, or the cell has no problem in ``split``.
          ValueError: there is no such split.
        """
        check_known(cell, self._settings, "tasks", "cell of reasoning-gym")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        name, _, level = cell.partition("/")
        dice = Dice("reasoning_gym", cell, seed, split)
        for _ in range(_MAX_TRIES):
            far_seed = dice.between(0, 2**31 - 2)
            item = self._gym.create_dataset(name, seed=far_seed, size=1, **self._settings[cell])[0]
            key = f"{name}:{self._content[name](item)}"
            if split_of(key) != split:
                continue
            if name in _SCORED:
                return _scored_task(item, key, name, int(level))
            if _PLAIN_NUMBER.fullmatch(item["answer"]):
                return _number_task(item, key, name, int(level))
        raise UserError(f"cell {cell} has no problem in split {split}", "use another cell")

    def _levels(self, name: str) -> dict[int, dict[str, Any]]:
        """{level: settings of the generator}."""
        if name not in self._factory.CURRICULA:
            return {_LONE_LEVEL: {}}
        base = _import("reasoning_gym.coaching.base_curriculum")
        # By default a range starts at the first step whatever the level: hard cells would be
        # full of easy problems.
        highest = base.DefaultCurriculumContext(mode=base.RangeAttributeMode.UPPER_BOUND)
        curriculum = self._factory.create_curriculum(name)
        steps = max(len(attribute.levels) for attribute in curriculum.attributes.values())
        levels = {}
        for level in range(1, min(steps, NUM_LEVELS) + 1):
            for attribute in curriculum.attributes.values():
                curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels)) - 1)
            config = curriculum.generate_configuration(context=highest)
            levels[level] = {k: v for k, v in vars(config).items() if k not in ("seed", "size")}
        return levels


def _number_task(item: Item, key: str, name: str, level: int) -> Task:
    return Task(
        domain="math",
        skill=name,
        difficulty=level_difficulty(level),
        prompt=f"{item['question'].strip()} {INSTRUCTION}",
        answer=item["answer"],
        key=key,
        solution=f"\\boxed{{{item['answer']}}}",
        source="reasoning_gym",
    )


def _scored_task(item: Item, key: str, name: str, level: int) -> Task:
    needed = {field: item[field] for field in ("question", "answer", "metadata")}
    return Task(
        domain="gym",
        skill=name,
        difficulty=level_difficulty(level),
        prompt=f"{item['question'].strip()}\n\n{SCORED_INSTRUCTION}",
        answer="",
        key=key,
        solution=f"<answer>{item['answer']}</answer>",
        source="reasoning_gym",
        checks=ScorerChecks(name, json.dumps(needed)),
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "reasoning_gym":
            raise
        raise UserError(
            "config.tasks.source: 'reasoning_gym' needs the package reasoning-gym, which is not "
            "installed",
            'pip install "cosr-jax[tasks]"',
        ) from error
