"""Stand-ins for rooms, without JAX: what they do is plain from what they are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from cosr_jax.types import (
    Completion,
    Finished,
    Outcome,
    SamplingParams,
    Task,
    Verdict,
    level_difficulty,
)


class FakeChat:
    """Characters as tokens 1, 2, ...; 0 pads and ends a turn."""

    pad_id = 0
    stop_ids: tuple[int, ...] = (0,)

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        return tuple(ord(c) for c in prompt)

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return (*(ord(c) for c in text), 0)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token)


class FakeEngine:
    """Answers each prompt with ``answer(prompt, sample number, seed)``; remembers its calls.

    What is finished first comes last in the call.
    """

    def __init__(self, answer: Callable[[str, int, int], str]):
        self._answer, self._chat = answer, FakeChat()
        self.calls: list[tuple[tuple[str, ...], int, SamplingParams, int]] = []

    def set_adapters(self, lora: object) -> None:
        raise AssertionError("nobody trains here")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seed: int,
        on_finished: Callable[[Finished], bool] | None = None,
    ) -> list[tuple[Completion, ...]]:
        texts = [self._chat.decode(prompt) for prompt in prompts]
        self.calls.append((tuple(texts), num_generations, sampling, seed))

        def completion(text: str) -> Completion:
            ids = self._chat.encode_completion(text)[: sampling.max_new_tokens]
            reason = "stop" if ids[-1] == 0 else "length"
            return Completion(ids, (-1.0,) * len(ids), self._chat.decode(ids), reason)

        groups = [
            tuple(completion(self._answer(text, i, seed)) for i in range(num_generations))
            for text in texts
        ]
        if on_finished is not None:
            for prompt, group in reversed(list(enumerate(groups))):
                for sample, done in reversed(list(enumerate(group))):
                    assert not on_finished(Finished(prompt, sample, done))
        return groups


class FakeVerifier:
    """Passes "[answer]", knows the bare value as right in value, cannot judge "?"."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[Task, Completion]]] = []

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        self.batches.append(list(cases))
        return [self._verdict(task, completion.text) for task, completion in cases]

    def close(self) -> None:
        pass

    def _verdict(self, task: Task, text: str) -> Verdict:
        if "?" in text:
            # What an ERROR says beside its outcome must not count.
            return Verdict(Outcome.ERROR, 1.0, "", value_correct=True, method="boxed")
        value, is_boxed = text.strip("[]"), text.startswith("[")
        method = "boxed" if is_boxed else "bare"
        if is_boxed and value == task.answer:
            return Verdict(Outcome.PASS, 1.0, "", value, method, value_correct=True)
        category = "wrong_answer" if is_boxed else "no_answer"
        return Verdict(Outcome.FAIL, 0.0, category, value, method, value == task.answer)


class FakeSource:
    """Additions "cell:number"; a cell holds as many different tasks as ``sizes`` says."""

    def __init__(self, sizes: dict[str, int]):
        self._sizes = sizes
        self.draws: list[tuple[str, str]] = []

    def cells(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    def draw(self, cell: str, seed: int, split: str) -> Task:
        self.draws.append((cell, split))
        digest = hashlib.sha256(f"{cell} {seed}".encode()).digest()
        return make_task(cell, int.from_bytes(digest[:4], "big") % self._sizes[cell])


def make_task(cell: str, number: int) -> Task:
    """The ``number``-th task of ``cell``; its answer is the number."""
    skill, _, level = cell.partition("/")
    key = f"{skill}:{level}:{number}"
    difficulty = level_difficulty(int(level))
    return Task("math", skill, difficulty, f"{key}=", str(number), key, f"[{number}]")
