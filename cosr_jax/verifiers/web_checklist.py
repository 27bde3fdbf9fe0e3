"""The second-level checker: a language model's opinion, where no program can judge.

It is off unless somebody builds a ``WebJudge`` with a checklist.  Items are fixed beforehand and
answered one by one; an answer counts only with a quotation that stands in the page, word for word.
It can lower a reward by a capped weight and can never raise one, and a verdict that it lowered says
so (``Verdict.is_subjective``), so that training can leave it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cosr_jax.types import Verdict

MAX_WEIGHT = 0.5
_MIN_QUOTE = 8  # characters: shorter ones stand in every page
_MAX_MATERIAL = 50_000  # characters


@dataclasses.dataclass(frozen=True)
class Material:
    """What is shown to the model, and where quotations are looked for."""

    text: str  # visible
    markup: str  # the document as it stands after all steps


class Ask(Protocol):
    """Asks a language model about one item."""

    async def __call__(self, item: str, material: Material) -> Mapping[str, Any]:
        """{"fails": bool, "quote": str}: whether the page falls short, and where that is seen."""
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

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("a checklist needs an item")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight {self.weight} is not in (0, {MAX_WEIGHT}]")


async def lowered(verdict: Verdict, checklist: Checklist, material: Material) -> Verdict:
    """``verdict``, with less reward for each item that fails with evidence.

    An item whose answer is malformed, lacks evidence, or does not come is left out and named in the
    detail.
    """
    if verdict.reward <= 0:
        return verdict
    shown = Material(material.text[:_MAX_MATERIAL], material.markup[:_MAX_MATERIAL])
    failed, notes = 0, []
    for item in checklist.items:
        try:
            answer = await checklist.ask(item, shown)
        except Exception as error:  # whatever a model's client raises: the page did nothing
            notes.append(f"{item[:60]!r} unanswered ({type(error).__name__})")
            continue
        if not _is_answer(answer):
            notes.append(f"{item[:60]!r} answered out of form")
        elif answer["fails"] and not _stands_in(answer["quote"], shown):
            notes.append(f"{item[:60]!r} without evidence")
        elif answer["fails"]:
            failed += 1
            notes.append(f"{item[:60]!r} fails: {answer['quote'][:60]!r}")
    detail = "; ".join(filter(None, [verdict.detail, *notes]))[:1000]
    if not failed:
        return dataclasses.replace(verdict, detail=detail)
    share = 1 - checklist.weight * failed / len(checklist.items)
    return dataclasses.replace(
        verdict, reward=verdict.reward * share, detail=detail, is_subjective=True
    )


def _is_answer(answer: object) -> bool:
    return (
        isinstance(answer, Mapping)
        and isinstance(answer.get("fails"), bool)
        and isinstance(answer.get("quote", ""), str)
        and ("quote" in answer or not answer["fails"])
    )


def _stands_in(quote: str, material: Material) -> bool:
    folded = " ".join(quote.split())
    return len(folded) >= _MIN_QUOTE and any(
        folded in " ".join(text.split()) for text in (material.text, material.markup)
    )
