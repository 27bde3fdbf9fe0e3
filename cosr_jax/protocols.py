"""The few methods that one room needs of another.  Fakes satisfy these without inheriting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cosr_jax.types import Completion, Diagnosis, Plan, SamplingParams, Task, Verdict


class Curator(Protocol):
    """Decides what the student practises next, from measurements alone."""

    def plan(self, diagnosis: Diagnosis) -> Plan:
        """Plans the next round."""
        ...

    def observe_gain(self, plan: Plan, gain: float) -> None:
        """Tells the measured change of validation accuracy that followed ``plan``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        ...


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
    ) -> list[tuple[Completion, ...]]:
        """``num_generations`` completions of each prompt (token ids), in the prompts' order."""
        ...


class Verifier(Protocol):
    """Judges completions; the same input always gives the same outcome and reward."""

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
