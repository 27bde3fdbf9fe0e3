"""The answer adapter: free text into the verifier's strict form, by pointing at what is written.

An answer that fails for its form alone is looked at again.  ``verifiers.statement`` says what the
text can be taken to state, if anything; a model in the role checker, which sees the text but
neither the task nor its answer, has to point at the same place; then what the student wrote there,
unit included, goes to the verifier in the form that the run asks for.  Whatever the model says,
nothing else can become the answer.  The verifier's own verdict stays beside the adapted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosr_jax.config import RunConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.budget import Budget
from cosr_jax.curator.calls import Complaint, Question, Reply
from cosr_jax.curator.client import Client
from cosr_jax.curator.parsing import parse
from cosr_jax.protocols import Verifier
from cosr_jax.types import Completion, Outcome, Task, Verdict
from cosr_jax.verifiers.statement import Statement, stated_answer

#: How an answer is given in each form that the maths verifier accepts.
_FORMS: Mapping[str, Callable[[str], str]] = {
    "boxed": "\\boxed{{{}}}".format,
    "answer_tag": "<answer>{}</answer>".format,
    "hashes": "#### {}".format,
    "phrase": "The answer is {}".format,
    "bare": "{}".format,
    "number": "{}".format,
}


class Adapter:
    """Looks again at answers that have a value and not the form.

    Args:
      config: ``config.curator.llm`` says where to ask and what it may cost.
      verifier: judges what was found.

    Raises:
      UserError: an endpoint or role cannot be read; a key or the ``openai`` package is missing.
    """

    def __init__(self, config: RunConfig, verifier: Verifier):
        self._verifier = verifier
        self._records: list[dict[str, Any]] = []
        llm = config.curator.llm
        self._client = Client(llm, seed=config.seed, on_call=self._note_call)
        self._form = _FORMS[config.verifier.accept[0]]
        self._counts = dict.fromkeys(("looked_at", "pointed_at", "passed"), 0)

    def adapt(
        self, cases: Sequence[tuple[Task, Completion]], verdicts: Sequence[Verdict]
    ) -> list[Verdict]:
        """The verdicts, with a pass for each answer that is right and lacked the form alone.

        Args:
          cases: what was judged.
          verdicts: the verifier's, in the same order; none but failures for want of an answer in
            the right form can change.

        Raises:
          UserError: a recording is missing or damaged, or cannot be written.
        """
        found: dict[int, Statement] = {}
        for place, ((task, done), verdict) in enumerate(zip(cases, verdicts, strict=True)):
            is_open = verdict.outcome is Outcome.FAIL and verdict.category == "no_answer"
            if is_open and task.domain == "math":
                statement = stated_answer(done.text, task.prompt, done.finish_reason)
                if statement is not None:
                    found[place] = statement
        self._counts["looked_at"] += len(found)
        replies = self._client.ask_all([_question(statement) for statement in found.values()])
        pointed = {
            place: statement
            for (place, statement), reply in zip(found.items(), replies, strict=True)
            if isinstance(reply, Reply) and _agrees(statement, reply)
        }
        self._counts["pointed_at"] += len(pointed)
        adapted = list(verdicts)
        again = [
            (cases[place][0], Completion((), (), self._form(statement.written), "stop"))
            for place, statement in pointed.items()
        ]
        judged = self._verifier.judge(again) if again else []
        for (place, statement), verdict in zip(pointed.items(), judged, strict=True):
            if verdict.outcome is Outcome.PASS:
                adapted[place] = dataclasses.replace(verdict, detail=f"adapted: {verdict.detail}")
                self._counts["passed"] += 1
            self._note(cases[place], statement, verdicts[place], verdict)
        return adapted

    def share(self, budget: Budget) -> None:
        """Spends from ``budget``, the curator's, so that its limits hold for both together."""
        self._client.budget = budget

    def start_round(self, number: int) -> None:
        """Begins round ``number`` of the budget."""
        self._client.start_round(number)

    def figures(self) -> dict[str, float]:
        """Answers looked at, pointed at and passed, and the client's counts; curator/adapter/."""
        values = {**self._client.stats(), **self._counts}
        return {f"curator/adapter/{name}": float(value) for name, value in sorted(values.items())}

    def take_records(self) -> list[dict[str, Any]]:
        """A record of each call, and of each answer that was judged again, since the last time."""
        records, self._records[:] = list(self._records), []
        return records

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        return {"client": self._client.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        self._client.load_state_dict(state["client"])
        self._counts = dict(state["counts"])

    def _note_call(self, record: Mapping[str, Any]) -> None:
        self._records.append({"event": "call", **record})

    def _note(
        self, case: tuple[Task, Completion], statement: Statement, raw: Verdict, adapted: Verdict
    ) -> None:
        task, done = case
        self._records.append(
            {
                "event": "adaptation",
                "task": task.task_id,
                "text": done.text,
                "quote": statement.written,
                "raw": {"outcome": raw.outcome.value, "category": raw.category},
                "adapted": {"outcome": adapted.outcome.value, "category": adapted.category},
            }
        )


def _question(statement: Statement) -> Question:
    return Question(prompts.pointer(statement.text), _complaint)


def _complaint(reply: Reply) -> Complaint | None:
    found = parse("pointer", reply, prompts.POINTER_CONTEXT)
    return None if found.value is not None else Complaint(found.error, found.detail or found.error)


def _agrees(statement: Statement, reply: Reply) -> bool:
    """Whether the model points at what the rules have found."""
    value = parse("pointer", reply, prompts.POINTER_CONTEXT).value
    return value is not None and statement.is_pointed_at(value["quote"], value["occurrence"])
