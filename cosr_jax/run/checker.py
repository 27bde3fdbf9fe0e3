"""Asks the curator's models about the student's pages, for ``verifiers.web_checklist``.

A question is asked once in a round: equal pages share an answer, or the lack of one, so that a
replayed or resumed run meets the same opinions in whatever order pages are judged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cosr_jax.config import RunConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.budget import Budget
from cosr_jax.curator.calls import CallError, Complaint, Question, Reply
from cosr_jax.curator.client import Client
from cosr_jax.curator.parsing import parse
from cosr_jax.curator.session import Session
from cosr_jax.verifiers.web_checklist import (
    MIN_QUOTE,
    Checklist,
    Material,
    Opinion,
    Unanswered,
    stands_in,
)


class Checker:
    """Implements ``web_checklist.Ask`` with a client of the curator's models.

    It is called on the verifiers' event loop; everything else is for the time between batches.

    Args:
      config: ``config.curator.llm`` says where to ask and what it may cost.

    Raises:
      UserError: an endpoint or role cannot be read; a key or the ``openai`` package is missing.
    """

    def __init__(self, config: RunConfig):
        self._records: list[Mapping[str, Any]] = []
        llm = config.curator.llm
        self._client = Client(llm, seed=config.seed, on_call=self._records.append)
        self._max_tokens = llm.prompt_tokens
        # A page takes its time as well before the case is given up.
        self._deadline_s = config.verifier.deadline_s / 2
        self._answers: dict[str, dict[str, Any]] = {}  # of the round, by question
        self._locks: dict[str, asyncio.Lock] = {}
        self._open: Session | None = None
        self._callers = 0

    async def __call__(self, item: str, material: Material) -> Opinion:
        """What the models say about one item.

        Raises:
          Unanswered: no model gave an answer with evidence, for whatever reason the client tells.
          UserError: a recording is missing or damaged, or cannot be written.
        """
        question = self._question(item, material, self._max_tokens)
        key = self._client.key(question)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._answers:
                self._answers[key] = await self._asked(question)
        answer = self._answers[key]
        if "unanswered" in answer:
            raise Unanswered(answer["unanswered"])
        return Opinion(**answer)

    def share(self, budget: Budget) -> None:
        """Spends from ``budget``, the curator's, so that its limits hold for both together."""
        self._client.budget = budget

    def start_round(self, number: int) -> None:
        """Begins round ``number``: what was not answered in the last one may be asked again."""
        self._client.start_round(number)
        self._answers.clear()
        self._locks.clear()

    def figures(self) -> dict[str, float]:
        """The client's counts, under curator/checklist/."""
        return {f"curator/checklist/{name}": v for name, v in self._client.stats().items()}

    def take_records(self) -> list[dict[str, Any]]:
        """A record of each call since the last time, in an order that only depends on them."""
        records = sorted(self._records, key=lambda record: record["key"])
        self._records.clear()
        return [{"event": "call", **record} for record in records]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        return {"client": self._client.state_dict(), "answers": dict(self._answers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        self._client.load_state_dict(state["client"])
        self._answers = dict(state["answers"])

    async def _asked(self, question: Question) -> dict[str, Any]:
        """An opinion's fields, or {"unanswered": why}."""
        try:
            async with self._session() as session:
                reply = await session.ask(question)
        except CallError as error:
            return {"unanswered": error.reason}
        value = parse("opinion", reply, prompts.OPINION_CONTEXT).value
        assert value is not None, "the question accepts nothing else"
        return dict(value)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        """One session for all that is asked at the same time, so that its limits hold for all."""
        if self._open is None:
            self._open = Session(self._client)
        session = self._open
        self._callers += 1
        try:
            yield session
        finally:
            self._callers -= 1
            if not self._callers:
                self._open = None
                await session.close()

    def _question(self, item: str, material: Material, max_tokens: int) -> Question:
        request = prompts.opinion(item, material.text, material.markup, max_tokens)
        half = max_tokens // 2

        def accept(reply: Reply) -> Complaint | None:
            found = parse("opinion", reply, prompts.OPINION_CONTEXT)
            if found.value is None:
                return Complaint(found.error, found.detail or found.error)
            if found.value["fails"] and not stands_in(found.value["quote"], material):
                return Complaint(
                    "schema",
                    f"quote is no passage of the page of {MIN_QUOTE} characters or more; copy one "
                    "word for word, or say that the page does not fail",
                )
            return None

        def shorter() -> Question | None:
            if half < prompts.LEAST_TOKENS:
                return None
            return self._question(item, material, half)

        return Question(request, accept, shorter, self._deadline_s)


def make_checklist(config: RunConfig, checker: Checker) -> Checklist:
    """The checklist of ``config.verifier``."""
    verifier = config.verifier
    return Checklist(
        verifier.checklist,
        checker,
        verifier.checklist_weight,
        only_passes=not verifier.partial_credit,
    )
