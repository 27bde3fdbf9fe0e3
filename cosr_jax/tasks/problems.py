"""What a generator of tasks makes, in any domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cosr_jax.tasks.splits import Dice
from cosr_jax.types import Checks, Domain


class Problem(NamedTuple):
    """One problem before it becomes a task."""

    content: str  # the same for all wordings, names and orders that ask the same
    ask: str  # as put to the student, without the domain's instruction
    solution: str  # a worked answer that the verifier passes
    answer: str = ""  # maths only
    checks: Checks | None = None  # of the domain's kind; None for maths


#: From a level (1 to NUM_LEVELS) and a random stream to a problem.  Levels of one skill never share
#: a ``content``.
Generator = Callable[[int, Dice], Problem]


@dataclasses.dataclass(frozen=True)
class Course:
    """The skills of one domain."""

    domain: Domain
    instruction: str  # ends every prompt; what counts as an answer must not depend on the skill
    skills: Mapping[str, Generator]  # names are unique over all domains
