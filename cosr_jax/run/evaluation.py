"""Deterministic measurement of the student on fixed probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.protocols import ChatTokenizer, RolloutEngine, Verifier
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.judging import JudgeClock, Judging
from cosr_jax.tasks.probes import ProbeSet
from cosr_jax.types import Completion, Outcome, SamplingParams, Task, Verdict


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """One greedy answer to every task of a probe set, judged.  All tuples run over the tasks."""

    judged: tuple[bool, ...]  # False where the verifier could not judge
    strict: tuple[bool, ...]  # passed
    lenient: tuple[bool, ...]  # right value, whatever its form
    categories: tuple[str, ...]  # failure category, "" for a pass
    answers: tuple[str, ...]  # the student's full text
    generated_tokens: int
    adapted: tuple[bool, ...] = ()  # passed in the adapter's eyes, see ``run.adapter``; () without

    @property
    def accuracy(self) -> float:
        """Share of judged tasks that passed, in [0, 1]; 0 when none was judged."""
        return sum(self.strict) / max(1, sum(self.judged))

    @property
    def adapted_accuracy(self) -> float:
        """As ``accuracy``, in the adapter's eyes."""
        return sum(self.adapted) / max(1, sum(self.judged))

    @property
    def num_judged(self) -> int:
        """Tasks with a verdict."""
        return sum(self.judged)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeResult:
        """Rebuilds a result after a trip through JSON."""
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}  # type: ignore
        )


def measure(
    tasks: Sequence[Task],
    engine: RolloutEngine,
    tokenizer: ChatTokenizer,
    verifier: Verifier,
    max_new_tokens: int,
    adapter: Adapter | None = None,
) -> ProbeResult:
    """Answers every task greedily (pass@1) and judges the answers; an adapter looks at them again.

    The same weights and tasks give the same result: nothing is drawn, and tasks are answered in
    their given order.  An answer is judged while others are still decoded.
    """
    prompts = [tokenizer.encode_prompt(task.prompt) for task in tasks]
    greedy = SamplingParams(max_new_tokens, temperature=0.0)
    with Judging(verifier, tasks, 1, JudgeClock()) as judging:
        answers = engine.generate(prompts, 1, greedy, 0, judging.note)
        verdicts = [verdict for (verdict,) in judging.verdicts(answers)]
    completions = [completion for (completion,) in answers]
    result = _result(completions, verdicts)
    if adapter is None:
        return result
    cases = list(zip(tasks, completions, strict=True))
    adapted = tuple(v.outcome is Outcome.PASS for v in adapter.adapt(cases, verdicts))
    return dataclasses.replace(result, adapted=adapted)


def _result(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> ProbeResult:
    return ProbeResult(
        judged=tuple(v.outcome is not Outcome.ERROR for v in verdicts),
        strict=tuple(v.outcome is Outcome.PASS for v in verdicts),
        lenient=tuple(v.outcome is not Outcome.ERROR and v.value_correct for v in verdicts),
        categories=tuple(v.category for v in verdicts),
        answers=tuple(c.text for c in completions),
        generated_tokens=sum(len(c.token_ids) for c in completions),
    )


def judged_by_domain(probe: ProbeSet, result: ProbeResult) -> dict[str, list[int]]:
    """By domain, how many verdicts there should be and how many are missing."""
    counts: dict[str, list[int]] = {}
    for task, is_judged in zip(probe.tasks, result.judged, strict=True):
        count = counts.setdefault(task.domain, [0, 0])
        count[0] += 1
        count[1] += not is_judged
    return counts
