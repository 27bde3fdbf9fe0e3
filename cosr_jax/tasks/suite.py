"""The procedural suite: endless problems with worked answers, on a grid of skills and levels.

Skills come from the courses of one or several domains, so that one run can practise maths beside
Python functions, proofs and web pages.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from cosr_jax.tasks.domains import COURSES
from cosr_jax.tasks.problems import Course
from cosr_jax.tasks.splits import SPLITS, Dice, split_of
from cosr_jax.types import NUM_LEVELS, Task, UserError, level_difficulty

#: A split that holds 1 % of a cell's draws is missed with probability e^-20.
_MAX_TRIES = 2000


class ProceduralSuite:
    """A ``TaskSource`` over the skills of the given domains.

    Args:
      skills: skills to draw from, in this order; empty: all of the domains.
      max_level: hardest level to draw.
      domains: names in ``courses``, at least one.
      courses: what can be drawn from.

    Raises:
      UserError: a skill or domain is unknown, or none is named.
    """

    def __init__(
        self,
        skills: Collection[str] = (),
        max_level: int = NUM_LEVELS,
        domains: Collection[str] = ("math",),
        courses: Mapping[str, Course] = COURSES,
    ):
        if not domains:
            raise UserError("config.tasks.domains: names no domain", "write e.g. ('math', 'code')")
        for domain in domains:
            check_known(domain, courses, "config.tasks.domains", "domain of the suite")
        course_of = {skill: courses[d] for d in domains for skill in courses[d].skills}
        for skill in skills:
            check_known(skill, course_of, "config.tasks.skills", "skill of the run's domains")
        self._cells = {
            f"{skill}/{level}": (course_of[skill], skill, level)
            for skill in skills or course_of
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
        course, skill, level = self._cells[cell]
        dice = Dice("suite", cell, seed, split)
        for _ in range(_MAX_TRIES):
            problem = course.skills[skill](level, dice)
            key = f"{skill}:{problem.content}"
            if split_of(key) == split:
                return Task(
                    domain=course.domain,
                    skill=skill,
                    difficulty=level_difficulty(level),
                    prompt=f"{problem.ask} {course.instruction}",
                    answer=problem.answer,
                    key=key,
                    solution=problem.solution,
                    checks=problem.checks,
                )
        raise UserError(f"cell {cell} has no question in split {split}", "use another cell")


def check_known(name: str, known: Iterable[str], key: str, kind: str) -> None:
    """Raises a ``UserError`` that names the nearest of ``known`` unless ``name`` is one."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise UserError(f"{key}: {name!r} is not a {kind}", hint)
