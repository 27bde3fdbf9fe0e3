"""Where problems come from, what admits them, and what is kept for review."""

from __future__ import annotations

from cosr_jax.config import TasksConfig
from cosr_jax.protocols import TaskSource
from cosr_jax.tasks.suite import ProceduralSuite


def make_source(config: TasksConfig) -> TaskSource:
    """The task source that ``config`` names, limited to its skills and levels.

    Raises:
      UserError: a skill or domain is unknown, or the source's package is not installed.
    """
    if config.source == "reasoning_gym":
        from cosr_jax.tasks.reasoning_gym_source import ReasoningGymSource

        return ReasoningGymSource(config.skills, config.max_level, config.domains)
    return ProceduralSuite(config.skills, config.max_level, config.domains)
