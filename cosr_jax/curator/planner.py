"""What next?  Measured gains decide; a model's proposal is a prior that they soon outweigh.

The arms of a round are those that the measurements allow (``strategies``), and, once a weakness is
accepted, one for each form in which an author can write tasks against it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.audit import Finding
from cosr_jax.curator.client import Client
from cosr_jax.curator.consult import consult
from cosr_jax.curator.prompts import ArmReport
from cosr_jax.curator.schemas import Context
from cosr_jax.types import CellEvidence

#: What a planner is told of each strategy.
ARMS: Mapping[str, str] = {
    "format_drill": "supervised steps where values are right already, to teach the answer's form",
    "review": "what was trained and has fallen, with much replay",
    "raise": "reinforcement with the next level mixed in",
    "lower": "reinforcement one level easier, or worked examples where even that gives no signal",
    "study": "supervised steps on worked answers of the focus",
    "reinforce": "reinforcement on the focus at its level",
    "targeted": "reinforcement on new tasks that need exactly what the student lacks",
    "contrastive": "reinforcement on new pairs of tasks that differ in the one feature that counts",
    "progressive": "reinforcement on a new sequence of tasks, from easy to hard",
    "decomposition": "reinforcement on new tasks that are the steps of a failed one",
    "worked": "supervised steps on new tasks with worked solutions",
    "star": "supervised steps on right answers of the student's own to what it solves at times",
    "star_hint": "the same for what it never solves, found while it was shown the answers",
}

#: Strategies whose tasks an author writes, in the order in which the bandit tries them.
FORMS: tuple[str, ...] = ("targeted", "worked", "contrastive", "progressive", "decomposition")

#: Domains in which tasks can be written: those of the schema.
AUTHORED_DOMAINS = ("math", "code")


@dataclasses.dataclass(frozen=True)
class Advice:
    """A planner's proposal, within the configured bounds."""

    strategy: str
    focus: tuple[str, ...]  # skills, the most urgent first
    difficulty: float  # in [0, 1]
    learning_rate_scale: float
    num_tasks: int

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Advice:
        """From the canonical value of the schema "plan"."""
        return cls(**{**value, "focus": tuple(value["focus"])})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {**dataclasses.asdict(self), "focus": list(self.focus)}

    def prior(self, weight: float) -> dict[str, float]:
        """For ``bandit.select``: as good as ``weight`` rounds of full gain, and no more."""
        return {self.strategy: weight}


def ask_for_advice(
    client: Client,
    accepted: Sequence[Finding],
    arms: Sequence[str],
    decisions: Sequence[Mapping[str, Any]],
    rates: Sequence[CellEvidence],
    skills: Sequence[str],
    config: CuratorLlmConfig,
) -> Advice:
    """Asks a planner which of ``arms`` to take, and how.

    Args:
      client: asks.
      accepted: weaknesses that passed the audit.
      arms: strategies of this round.
      decisions: of all rounds so far, with their gains.
      rates: successes by cell.
      skills: of the grid.
      config: bounds of what may be proposed.

    Raises:
      CallError: no model gave a usable answer.
    """
    context = Context(
        known_skills=skills,
        known_strategies=arms,
        limits={
            "learning_rate_scale": (config.learning_rate_low, config.learning_rate_high),
            "num_tasks": (0, config.tasks_per_round),
        },
    )
    weaknesses = [finding.weakness.to_dict() for finding in accepted]
    reports = [_arm_report(arm, decisions) for arm in arms]
    build = functools.partial(_build, weaknesses, reports, rates, context)
    result = consult(client, build, config.prompt_tokens).result
    assert result.value is not None, "the client accepts no answer without a value"
    return Advice.of(result.value)


def _build(
    weaknesses: Sequence[Mapping[str, Any]],
    reports: Sequence[ArmReport],
    rates: Sequence[CellEvidence],
    context: Context,
    max_tokens: int,
) -> prompts.Prompt:
    return prompts.planner(weaknesses, reports, rates, context, max_tokens)


def _arm_report(arm: str, decisions: Sequence[Mapping[str, Any]]) -> ArmReport:
    gains = [d["gain"] for d in decisions if d["strategy"] == arm and d["gain"] is not None]
    return ArmReport(arm, ARMS[arm], len(gains), statistics.fmean(gains) if gains else None)


def target(accepted: Sequence[Finding], advice: Advice | None) -> Finding:
    """The weakness to write against: of the proposal's focus if it is one, else the gravest."""
    for skill in advice.focus if advice else ():
        for finding in accepted:
            if finding.weakness.skill == skill:
                return finding
    return max(accepted, key=lambda finding: finding.weakness.severity * finding.rate)
