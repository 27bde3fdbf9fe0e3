"""The procedural suite: endless problems with worked answers, on a grid of skills and levels."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from cosr_jax.tasks.skills import MATH_SKILLS
from cosr_jax.tasks.splits import SPLITS, Dice, split_of
from cosr_jax.types import NUM_LEVELS, Task, UserError, level_difficulty

#: Ends every prompt; what counts as an answer must not depend on the skill.
INSTRUCTION = "Put the final answer in \\boxed{}."

#: A split that holds 1 % of a cell's draws is missed with probability e^-20.
_MAX_TRIES = 2000


class ProceduralSuite:
    """A ``TaskSource`` over the skills of ``cosr_jax.tasks.skills``.

    Args:
      skills: skills to draw from, in this order; empty: all.
      max_level: hardest level to draw.

    Raises:
      UserError: a skill is unknown.
    """

    def __init__(self, skills: Collection[str] = (), max_level: int = NUM_LEVELS):
        for skill in skills:
            check_known(skill, MATH_SKILLS, "config.tasks.skills", "skill")
        self._cells = {
            f"{skill}/{level}": (skill, level)
            for skill in skills or MATH_SKILLS
            for level in range(1, max_level + 1)
        }

    def cells(self) -> tuple[str, ...]:
        """All cells that the suite can draw from, e.g. ``"addition/2"``."""
        return tuple(self._cells)

    def draw(self, cell: str, seed: int, split: str) -> Task:
        """Draws one task; the same arguments always give the same task.

        Questions are drawn until one belongs to ``split`` (see ``splits.split_of``).

        Raises:
          UserError: the suite has no such cell, or the cell has no question in ``split``.
          ValueError: there is no such split.
        """
        check_known(cell, self._cells, "tasks", "cell of the suite")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        skill, level = self._cells[cell]
        dice = Dice("suite", cell, seed, split)
        for _ in range(_MAX_TRIES):
            question = MATH_SKILLS[skill](level, dice)
            key = f"{skill}:{question.content}"
            if split_of(key) == split:
                return Task(
                    domain="math",
                    skill=skill,
                    difficulty=level_difficulty(level),
                    prompt=f"{question.ask} {INSTRUCTION}",
                    answer=f"{question.answer} {question.unit}".rstrip(),
                    key=key,
                    solution=f"{question.steps} \\boxed{{{question.answer}}}".lstrip(),
                )
        raise UserError(f"cell {cell} has no question in split {split}", "use another cell")


def check_known(name: str, known: Iterable[str], key: str, kind: str) -> None:
    """Raises a ``UserError`` that names the nearest of ``known`` unless ``name`` is one."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise UserError(f"{key}: {name!r} is not a {kind}", hint)
