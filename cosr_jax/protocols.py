"""The few methods that one room needs of another.  Fakes satisfy these without inheriting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cosr_jax.types import (
    AdmissionResult,
    CellEvidence,
    Completion,
    Diagnosis,
    FailedSample,
    Finished,
    Plan,
    RolloutGroup,
    SamplingParams,
    Task,
    Verdict,
)


class Lab(Protocol):
    """Where a curator checks what it believes: fresh tasks, the student as it is, the verifiers.

    Nothing of it shows the curator a held-out task, or trains.
    """

    def draw(self, cell: str, count: int) -> list[Task]:
        """Distinct fresh training tasks of a cell; fewer where it holds fewer."""
        ...

    def sample(self, tasks: Sequence[Task], num_generations: int) -> list[RolloutGroup]:
        """The student's answers to each task, judged."""
        ...

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        """One verdict for each case, in order."""
        ...

    def admit(self, tasks: Sequence[Task]) -> AdmissionResult:
        """Sorts authored tasks into those fit for training and those refused, by reason."""
        ...


class Curator(Protocol):
    """Decides what the student practises next, from measurements alone.

    A class that inherits from this has to write ``plan`` alone; the others then remember nothing.
    """

    def wanted_diagnosis(self) -> tuple[str, ...]:
        """Cells to be sampled before ``plan``, so that its diagnosis has evidence of them."""
        return ()

    def asking_ahead(
        self, round: int, evidence: Sequence[CellEvidence], failures: Sequence[FailedSample]
    ) -> contextlib.AbstractContextManager[None]:
        """Asks, while the block runs, what ``plan`` would ask first; ``plan`` has the answers then.

        The student is measured in the block, so that neither waits for the other.  Nothing else of
        the curator is called there.  The end of the block waits for the answers, and an exception
        in it drops them.  What goes wrong with them ``plan`` tells, as if it had asked.

        Args:
          round: the one that is to be planned, if the run does not end with the measurement.
          evidence: of the round before; not yet of the cells of ``wanted_diagnosis``.
          failures: likewise.
        """
        return contextlib.nullcontext()

    def plan(self, diagnosis: Diagnosis, lab: Lab) -> Plan:
        """Plans the next round."""
        ...

    def observe_gain(self, plan: Plan, gain: float) -> None:
        """Tells the measured change of validation accuracy that followed ``plan``."""
        return None

    @property
    def rates(self) -> Mapping[str, float]:
        """The estimated pass rate of each cell that was measured, for a picture."""
        return {}

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One {"round", "strategy", "context", "reason", "gain"} per plan, for the report."""
        return []

    @property
    def chains(self) -> list[dict[str, Any]]:
        """How failures led to tasks, one JSON-serialisable record per plan, for the report."""
        return []

    def figures(self) -> Mapping[str, float]:
        """Counts since the run began, by TensorBoard name, e.g. "curator/llm/attempts"."""
        return {}

    def take_records(self) -> list[dict[str, Any]]:
        """What happened since the last call, as JSON-serialisable records for the log."""
        return []

    def take_seconds(self) -> tuple[float, float]:
        """Seconds since the last call that models were asked; those of them that a run waited."""
        return 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        return None


class TaskSource(Protocol):
    """Makes problems of named skill x level cells; the same arguments always give the same task."""

    def cells(self) -> tuple[str, ...]:
        """All cells that the source can draw from."""
        ...

    def draw(self, cell: str, seed: int, split: str) -> Task:
        """Draws one task of ``cell`` from ``split`` ("train", "validation" or "test")."""
        ...


class RolloutEngine(Protocol):
    """Samples the student."""

    def set_adapters(self, lora: Any) -> None:
        """The adapters to sample with from now on; call it after every update."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
        on_finished: Callable[[Finished], bool] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """``num_generations`` completions of each prompt (token ids), in the prompts' order.

        ``on_finished`` may be told of completions before all are known, in whatever order they end;
        where it answers True, nobody wants the other samples of the prompt any more.
        """
        ...


class Verifier(Protocol):
    """Judges completions; the same input always gives the same outcome and reward.

    ``judge`` may be called by several threads at once.
    """

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        """One verdict for each case, in order."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


class ChatTokenizer(Protocol):
    """Text to token ids in the student's chat format, and back."""

    pad_id: int
    stop_ids: tuple[int, ...]

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """One user turn up to and including the header of the assistant's turn."""
        ...

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """The assistant's text followed by the end-of-turn token."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...
