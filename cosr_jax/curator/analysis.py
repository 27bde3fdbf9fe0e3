"""Why does the student fail?  Models look at a sample of its wrong answers and make claims."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cosr_jax.curator import prompts
from cosr_jax.curator.calls import CallError, Question
from cosr_jax.curator.client import Client
from cosr_jax.curator.consult import Counsel, consult_each, to_each
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.quoting import quoted
from cosr_jax.curator.schemas import Context
from cosr_jax.types import CellEvidence, Completion, FailedSample

#: Characters of a rationale that are kept: it goes into prompts, logs and checkpoints.
_RATIONALE = 600


#: Kinds with a symptom of their own; the verifier cannot tell the others apart.
_SYMPTOM: Mapping[str, str] = {"format": "form", "incomplete": "cut"}


def symptom(kind: str) -> str:
    """What a verifier sees of a weakness: "form", "cut" or "value"."""
    return _SYMPTOM.get(kind, "value")


@dataclasses.dataclass(frozen=True)
class Weakness:
    """A claim about the student, in words of a model; see ``audit`` for what it is worth."""

    skill: str
    kind: str  # of ``schemas.KINDS_OF_WEAKNESS``
    evidence_task_ids: tuple[str, ...]
    severity: float  # in [0, 1], as the model sees it
    rationale: str  # untrusted
    teachers: tuple[str, ...] = ()  # endpoints whose models claim it

    @classmethod
    def of(cls, item: Mapping[str, Any], teacher: str = "") -> Weakness:
        """From a canonical item of the schema "analysis", and whose it is."""
        ids, rationale = tuple(item["evidence_task_ids"]), quoted(item["rationale"], _RATIONALE)
        teachers = (teacher,) if teacher else ()
        return cls(
            **{**item, "evidence_task_ids": ids, "rationale": rationale, "teachers": teachers}
        )

    @property
    def is_shared(self) -> bool:
        """Whether models that do not know of each other claim it."""
        return len(self.teachers) > 1

    def joined(self, other: Weakness) -> Weakness:
        """The same claim with the evidence of both; in words of the more severe one."""
        first, second = sorted((self, other), key=lambda claim: -claim.severity)
        ids = dict.fromkeys((*first.evidence_task_ids, *second.evidence_task_ids))
        teachers = tuple(sorted({*self.teachers, *other.teachers}))
        return dataclasses.replace(first, evidence_task_ids=tuple(ids), teachers=teachers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        lists = {"evidence_task_ids": list(self.evidence_task_ids), "teachers": list(self.teachers)}
        return {**dataclasses.asdict(self), **lists}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What came of an analysis."""

    weaknesses: tuple[Weakness, ...]  # claims, the shared ones first, then the most severe
    dropped: Mapping[str, int]  # claims that the parser could not keep, by reason
    unknown_ids: int  # ids cited that nobody has seen
    lost: tuple[str, ...] = ()  # reasons for which analysts gave no usable answer


@dataclasses.dataclass(frozen=True)
class Inquiry:
    """What analysts are asked.

    One analyst is whoever of the role's endpoints answers first; several are as many of these
    endpoints, each asked for itself.
    """

    failures: Sequence[FailedSample]  # of training samples
    rates: Sequence[CellEvidence]  # successes by cell
    skills: Collection[str]  # what claims may be about
    max_claims: int  # claims that are kept
    max_tokens: int  # longest prompt, estimated
    seed: int  # of the sample of failures that is shown
    analysts: int = 1  # models that look at the same failures, as far as the role has endpoints

    def prompt(self, max_tokens: int) -> prompts.Prompt:
        """The analysts' prompt, in at most so many tokens."""
        context = Context(known_skills=self.skills, max_items=self.max_claims)
        failures = [as_failure(failure) for failure in self.failures]
        return prompts.analyst(failures, self.rates, context, max_tokens, self.seed)

    def endpoints(self, client: Client) -> tuple[tuple[str, ...], ...]:
        """For each answer the names of those who may give it; (): those of the role."""
        names = tuple((e.name,) for e in client.routes["analyst"][: self.analysts])
        return names if len(names) > 1 else ((),)

    def questions(self, client: Client) -> list[Question]:
        """Those that ``analyse`` asks, for asking them ahead; only with failures there are any.

        Raises:
          UserError: not one failure fits into a prompt.
        """
        return to_each(self.prompt, self.max_tokens, self.endpoints(client))


def analyse(client: Client, inquiry: Inquiry) -> Analysis:
    """Asks for the weaknesses behind failures; without any there is none.

    Analysts that give no usable answer are done without.

    Raises:
      CallError: no model gave a usable answer.
      UserError: not one failure fits into a prompt; or a recording is missing or damaged.
    """
    if not inquiry.failures:
        return Analysis((), {}, 0)
    answers = consult_each(client, inquiry.prompt, inquiry.max_tokens, inquiry.endpoints(client))
    heard = [answer for answer in answers if isinstance(answer, Counsel)]
    errors = [answer for answer in answers if isinstance(answer, CallError)]
    if not heard:
        raise errors[0]
    claims: dict[tuple[str, str], Weakness] = {}
    dropped: collections.Counter[str] = collections.Counter()
    for counsel in heard:
        dropped.update(counsel.result.reasons)
        assert counsel.result.value is not None, "the client accepts no answer without a value"
        for item in counsel.result.value["weaknesses"]:
            claim = Weakness.of(item, counsel.endpoint)
            key = claim.skill, symptom(claim.kind)
            claims[key] = claims[key].joined(claim) if key in claims else claim
    ordered = sorted(claims.values(), key=lambda claim: (not claim.is_shared, -claim.severity))
    dropped["too_many"] += len(ordered[inquiry.max_claims :])
    unknown = sum(len(counsel.result.dropped_ids) for counsel in heard)
    lost = tuple(error.reason for error in errors)
    return Analysis(tuple(ordered[: inquiry.max_claims]), dict(+dropped), unknown, lost)


def as_failure(sample: FailedSample) -> Failure:
    """The record of a failed sample that prompts are made of."""
    return Failure.of(sample.task, Completion((), (), sample.text, "stop"), sample.verdict)
