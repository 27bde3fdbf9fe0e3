"""What ``bench_train`` measures: works, sizes, inputs, and how a measuring process is spoken to.

Neither JAX nor torch is imported here, so that a process's peak memory is its own side's alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much work; lengths in tokens, counts in sequences."""

    rank: int  # of the adapters, on every linear
    sft_rows: int
    sft_tokens: int  # of each row; all but the first are predicted
    rollout_prompts: int
    rollout_prompt_tokens: int
    rollout_new_tokens: int
    grpo_prompts: int
    grpo_samples: int  # of each prompt
    grpo_prompt_tokens: int
    grpo_new_tokens: int
    tail_prompts: int
    tail_samples: int  # of each prompt
    tail_prompt_tokens: int
    tail_limit: int  # longest completion; the mean is about a quarter
    tail_slots: int  # sequences decoded at once
    shared_samples: int  # of one prompt
    shared_prompt_tokens: int
    shared_new_tokens: int
    copied_mib: int  # size of the array that is copied
    greedy_tokens: int = 8  # of the rollout's check

    def tokens(self, work: str, part: str) -> int:
        """Tokens that one repetition of ``part`` counts: trained on, or newly sampled."""
        samples = self.grpo_prompts * self.grpo_samples
        shared = self.shared_prompt_tokens + self.shared_new_tokens
        return {
            ("sft", "step"): self.sft_rows * self.sft_tokens,
            ("rollout", "rollout"): self.rollout_prompts * self.rollout_new_tokens,
            ("grpo", "rollout"): samples * self.grpo_new_tokens,
            ("grpo", "train"): samples * (self.grpo_prompt_tokens + self.grpo_new_tokens),
            ("grpo", "step"): samples * self.grpo_new_tokens,
            ("shared", "step"): self.shared_samples * shared,
        }[work, part]


SIZES = {
    "smollm2": Sizes(16, 8, 256, 32, 128, 128, 8, 8, 54, 64, 32, 8, 54, 128, 32, 8, 512, 128, 512),
    "tiny": Sizes(
        4, 2, 24, 2, 12, 8, 2, 4, 10, 6, 4, 4, 10, 16, 4, 4, 16, 8, 1, greedy_tokens=4
    ),
    "qwen2.5-1.5b": Sizes(
        16, 8, 2048, 64, 512, 512, 16, 8, 256, 512, 64, 8, 256, 1024, 64, 8, 1024, 512, 1024
    ),
}  # fmt: skip
MICROBATCH = 16  # rows of a GRPO microbatch, on every side
LEARNING_RATE = 5e-4


@dataclasses.dataclass(frozen=True)
class Work:
    """A work of the table: what is done, and by whom beside our own side."""

    function: str  # in the module of each side
    beside: tuple[str, ...] = ()  # sides, our own with one setting changed among them
    dtype: str = "float32"
    length: int = 1  # factor of ``Sizes.sft_tokens``
    is_first_call: bool = False  # each repetition is the first call of a new process


#: side: (module that measures it, package that it needs).
SIDES = {
    "ours": ("bench_ours", "cosr_jax"),
    "batches": ("bench_ours", "cosr_jax"),  # slots are not refilled
    "unshared": ("bench_ours", "cosr_jax"),  # every sample computes the prompt of its group
    "peft": ("bench_peers", "peft"),
    "trl": ("bench_peers", "trl"),
    "tunix": ("bench_tunix", "tunix"),
    "vllm": ("bench_vllm", "vllm"),
}
PEERS = ("peft", "trl", "tunix", "vllm")
WORKS = {
    "ceiling": Work("ceiling"),
    "sft": Work("sft", ("peft", "tunix")),
    "sft-bf16": Work("sft", ("peft",), dtype="bfloat16"),
    "sft-2x": Work("sft", length=2),
    "sft-4x": Work("sft", length=4),
    "rollout": Work("rollout", ("peft", "tunix", "vllm")),
    "tail": Work("tail", ("batches",)),
    "grpo": Work("grpo", ("trl", "tunix")),
    "shared": Work("shared", ("unshared",)),
    "compile": Work("compile", is_first_call=True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One side's share of one work, for a process of its own."""

    work: str  # function of the side's module
    side: str  # key of ``SIDES``
    shape: str  # key of ``SIZES``
    scratch: str  # folder that all sides of a run share
    student: str = ""  # Hugging Face folder; empty for our side, which finds or makes it
    adapter: str = ""  # adapter in PEFT's format; written by our side, read by the others
    dtype: str = "float32"  # of base weights and products; adapters are float32 everywhere
    length: int = 1  # factor of the SFT step's rows

    @property
    def sizes(self) -> Sizes:
        """The sizes of ``shape``, with this job's own length."""
        sizes = SIZES[self.shape]
        return dataclasses.replace(sizes, sft_tokens=sizes.sft_tokens * self.length)

    def dumps(self) -> str:
        """As one command-line argument."""
        return json.dumps(dataclasses.asdict(self))


def token_rows(vocab: int, rows: int, length: int, seed: int) -> list[list[int]]:
    """``rows`` of uniformly random ids; the first quarter, with the special tokens, is left out."""
    rng = np.random.default_rng(seed)
    return rng.integers(vocab // 4, vocab, (rows, length)).tolist()


def sft_rows(vocab: int, sizes: Sizes) -> list[list[int]]:
    """The rows of the SFT step."""
    return token_rows(vocab, sizes.sft_rows, sizes.sft_tokens, seed=1)


def rollout_prompts(vocab: int, sizes: Sizes) -> list[list[int]]:
    """The prompts of the rollout."""
    return token_rows(vocab, sizes.rollout_prompts, sizes.rollout_prompt_tokens, seed=2)


def tail_prompts(vocab: int, sizes: Sizes) -> list[list[int]]:
    """The prompts of the rollout with a long tail."""
    return token_rows(vocab, sizes.tail_prompts, sizes.tail_prompt_tokens, seed=5)


def grpo_prompts(vocab: int, sizes: Sizes) -> list[list[int]]:
    """The prompts of the GRPO step."""
    return token_rows(vocab, sizes.grpo_prompts, sizes.grpo_prompt_tokens, seed=3)


def scored_completions(vocab: int, sizes: Sizes) -> list[list[int]]:
    """One completion of each GRPO prompt, for both sides to score before any timing."""
    return token_rows(vocab, sizes.grpo_prompts, sizes.grpo_new_tokens, seed=4)


def shared_group(vocab: int, sizes: Sizes) -> tuple[list[int], list[list[int]]]:
    """A prompt and its completions."""
    (prompt,) = token_rows(vocab, 1, sizes.shared_prompt_tokens, seed=6)
    return prompt, token_rows(vocab, sizes.shared_samples, sizes.shared_new_tokens, seed=7)


def sample_reward(index: int) -> float:
    """Samples of a group fail and pass in turn, so every group is informative."""
    return float(index % 2)


class Channel:
    """A measuring process's end of the conversation: a JSON line out for each line in.

    What libraries print goes to stderr.
    """

    def __init__(self) -> None:
        self._answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._cpu = 0.0

    def ready(
        self, label: str, first: dict[str, float], check: Sequence[float], **about: Any
    ) -> None:
        """Warmed up.

        Args:
          label: the side in words.
          first: seconds of the first call of each part, compilation included.
          check: figures that must agree with the other sides'.
          about: versions, threads, and what the other sides need; ``amounts`` has for each part
            what a repetition does, where that is not ``Sizes.tokens``: [number, unit].
        """
        about |= {"cpu_s": time.process_time(), "peak_rss_gib": peak_rss_gib()}
        self._send(label=label, first=first, check=[float(x) for x in check], **about)

    def go_on(self) -> bool:
        """Waits for the next repetition; False at the end."""
        wanted = sys.stdin.readline().strip() == "go"
        self._cpu = time.process_time()
        return wanted

    def done(self, **seconds: float) -> None:
        """One repetition's wall seconds by part."""
        cpu_s = time.process_time() - self._cpu
        self._send(seconds=seconds, cpu_s=cpu_s, peak_rss_gib=peak_rss_gib())

    def _send(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")


class Recorder(Channel):
    """A channel to this very process: asks for ``repeats`` repetitions, and keeps the answers."""

    def __init__(self, repeats: int):
        self._left = repeats
        self.about: dict[str, Any] = {}
        self.seconds: list[dict[str, float]] = []

    def ready(
        self, label: str, first: dict[str, float], check: Sequence[float], **about: Any
    ) -> None:
        """As ``Channel.ready``."""
        self.about = {"label": label, "first": first, "check": list(check), **about}

    def go_on(self) -> bool:
        """Whether a repetition is left."""
        self._left -= 1
        return self._left >= 0

    def done(self, **seconds: float) -> None:
        """As ``Channel.done``."""
        self.seconds.append(seconds)


def peak_rss_gib() -> float:
    """This process's largest resident memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clock(function: Any, *args: Any) -> tuple[float, Any]:
    """(wall seconds, result)."""
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result
