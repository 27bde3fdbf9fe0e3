"""How one round was planned with language models: from failures to an order, as a record."""

from __future__ import annotations

import dataclasses
from typing import Any

from cosr_jax.curator.audit import Finding
from cosr_jax.curator.authoring import Authored
from cosr_jax.curator.planner import AUTHORED_DOMAINS, Advice
from cosr_jax.curator.procedural import Options
from cosr_jax.curator.quoting import quoted
from cosr_jax.protocols import Lab
from cosr_jax.types import Diagnosis, Plan

#: Characters of texts in the report's chains.
_SHOWN = 300


@dataclasses.dataclass
class Round:
    """What is known of a round while it is planned."""

    diagnosis: Diagnosis
    lab: Lab
    options: Options
    findings: tuple[Finding, ...] = ()
    advice: Advice | None = None
    authored: Authored | None = None
    target: Finding | None = None
    fallback: str = ""  # why the procedural curator took over, or had to do without some advice

    @property
    def accepted(self) -> tuple[Finding, ...]:
        """Weaknesses that showed again on fresh answers."""
        return tuple(finding for finding in self.findings if finding.is_accepted)

    @property
    def authorable(self) -> tuple[Finding, ...]:
        """Accepted weaknesses that tasks can be written against."""
        domains = {f.task.skill: f.task.domain for f in self.diagnosis.failures}
        return tuple(f for f in self.accepted if domains[f.weakness.skill] in AUTHORED_DOMAINS)

    def chain(self, plan: Plan, spent: dict[str, float]) -> dict[str, Any]:
        """The record of the round: failure, weakness, task; the gain comes later.

        Args:
          plan: what came of it.
          spent: calls, tokens and dollars.
        """
        cited = set(self.target.weakness.evidence_task_ids) if self.target else set()
        example = next((f for f in self.diagnosis.failures if f.task.task_id in cited), None)
        return {
            "round": self.diagnosis.round,
            "failures": len(self.diagnosis.failures),
            "failure": example
            and {
                "id": example.task.task_id,
                "prompt": quoted(example.task.prompt, _SHOWN),
                "answer": quoted(example.text, _SHOWN),
                "expected": quoted(example.task.answer, _SHOWN),
                "category": example.verdict.category,
            },
            "findings": [finding.to_dict() for finding in self.findings],
            "weakness": self.target.to_dict() if self.target else None,
            "advice": self.advice.to_dict() if self.advice else None,
            "authored": self.authored.to_dict() if self.authored else None,
            "fallback": self.fallback,
            "strategy": plan.strategy,
            "context": plan.context,
            "spent": spent,
            "gain": None,
        }
