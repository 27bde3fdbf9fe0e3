"""All domains of the procedural suite."""

from __future__ import annotations

from collections.abc import Mapping

from cosr_jax.tasks.code_skills import CODE
from cosr_jax.tasks.problems import Course, Generator, Problem
from cosr_jax.tasks.proof_skills import PROOF
from cosr_jax.tasks.skills import INSTRUCTION, MATH_SKILLS, Skill
from cosr_jax.tasks.splits import Dice
from cosr_jax.tasks.web_skills import WEB


def _boxed(skill: Skill) -> Generator:
    def problem(level: int, dice: Dice) -> Problem:
        question = skill(level, dice)
        return Problem(
            question.content,
            question.ask,
            solution=f"{question.steps} \\boxed{{{question.answer}}}".lstrip(),
            answer=f"{question.answer} {question.unit}".rstrip(),
        )

    return problem


MATH = Course(
    "math",
    INSTRUCTION,
    {name: _boxed(skill) for name, skill in MATH_SKILLS.items()},
)

COURSES: Mapping[str, Course] = {course.domain: course for course in (MATH, CODE, PROOF, WEB)}
