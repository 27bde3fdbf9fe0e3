"""The second-level checker: a language model's opinion, where no program can judge.

It is off unless somebody builds a ``WebJudge`` with a checklist.  Items are fixed beforehand and
answered one by one; an answer counts only with a quotation that stands in the page.  Opinions can
lower a reward by a capped weight and can never raise one, nor change an outcome; a verdict that
they lowered says so (``Verdict.is_subjective``), so that training can leave it out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Protocol

from cosr_jax.types import Outcome, Verdict

MAX_WEIGHT = 0.5
MIN_QUOTE = 8  # characters without blanks: shorter ones stand in every page
_MAX_MATERIAL = 50_000  # characters


@dataclasses.dataclass(frozen=True)
class Material:
    """What is shown to the model, and where quotations are looked for."""

    text: str  # visible
    markup: str  # the document as it stands after all steps


@dataclasses.dataclass(frozen=True)
class Opinion:
    """A model's answer about one item."""

    fails: bool  # whether the page falls short
    quote: str  # where in the page that is seen


class Unanswered(Exception):
    """Nobody could be asked, or gave a usable answer: the page did nothing.

    Args:
      reason: from a small set, e.g. "breaker_open".
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Ask(Protocol):
    """Asks a language model about one item."""

    async def __call__(self, item: str, material: Material) -> Opinion:
        """The opinion.

        Raises:
          Unanswered: there is none.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Checklist:
    """Items and who is asked.

    Raises:
      ValueError: there is no item, or the weight is not in (0, ``MAX_WEIGHT``].
    """

    items: Sequence[str]
    ask: Ask
    weight: float = 0.2  # share of the reward that is lost when every item fails
    only_passes: bool = False  # nobody is asked about other pages, which earn nothing anyway

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("a checklist needs an item")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight {self.weight} is not in (0, {MAX_WEIGHT}]")

    def concerns(self, verdict: Verdict) -> bool:
        """Whether there is a reward to be lowered."""
        return verdict.reward > 0 and (verdict.outcome is Outcome.PASS or not self.only_passes)


async def lowered(verdict: Verdict, checklist: Checklist, material: Material) -> Verdict:
    """``verdict``, with less reward for each item that fails with evidence.

    All items are asked about at once.  One that fails without evidence is named in the detail and
    left out; so is one that nobody answers, which ``Verdict.unanswered`` counts.
    """
    if not checklist.concerns(verdict):
        return verdict
    shown = Material(material.text[:_MAX_MATERIAL], material.markup[:_MAX_MATERIAL])
    answers = await asyncio.gather(
        *(checklist.ask(item, shown) for item in checklist.items), return_exceptions=True
    )
    failed = unanswered = 0
    notes = []
    for item, answer in zip(checklist.items, answers, strict=True):
        if isinstance(answer, Unanswered):
            unanswered += 1
            notes.append(f"{item[:60]!r} unanswered ({answer.reason})")
        elif isinstance(answer, BaseException):
            raise answer
        elif answer.fails and not stands_in(answer.quote, shown):
            notes.append(f"{item[:60]!r} without evidence")
        elif answer.fails:
            failed += 1
            notes.append(f"{item[:60]!r} fails: {answer.quote[:60]!r}")
    return dataclasses.replace(
        verdict,
        reward=verdict.reward * (1 - checklist.weight * failed / len(checklist.items)),
        detail="; ".join(filter(None, [verdict.detail, *notes]))[:1000],
        is_subjective=failed > 0,
        unanswered=unanswered,
    )


def stands_in(quote: str, material: Material) -> bool:
    """Whether ``quote`` is a passage of the page.

    Blanks and what cannot be seen do not count: a prompt breaks up whatever looks like a control
    token and replaces hidden characters, and a model leaves them out.
    """
    folded = _visible(quote)
    return len(folded) >= MIN_QUOTE and any(
        folded in _visible(text) for text in (material.text, material.markup)
    )


def _visible(text: str) -> str:
    whole = text.encode("utf-8", "replace").decode()  # a lone surrogate is shown as "?"
    return "".join(
        c
        for c in whole
        if not c.isspace() and c != "\N{REPLACEMENT CHARACTER}" and unicodedata.category(c) != "Cf"
    )
