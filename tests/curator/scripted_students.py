"""Students with planted defects, a lab around them, and a curator model that mixes truth and lies.

A student solves the suite's maths but for its defects: (skill, kind) pairs, each of which spoils a
share of that skill's answers in its own way.  Its other answers are wrong now and then.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from openai_server import Exchange, completion

from cosr_jax.config import CuratorConfig, CuratorLlmConfig
from cosr_jax.curator.llm import LlmCurator
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.run.laboratory import Laboratory
from cosr_jax.run.practice import count_evidence, failed_samples
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import Completion, Diagnosis, Outcome, RolloutGroup, Task, Verdict

KINDS = ("format", "knowledge", "logic", "arithmetic", "incomplete")
#: Kinds that a verifier cannot tell apart.
SYMPTOM = {"format": "form", "incomplete": "cut"}
SUITE = ProceduralSuite(max_level=2)
SKILLS = tuple(dict.fromkeys(cell.split("/")[0] for cell in SUITE.cells()))
SLIPS = 0.06  # share of a healthy student's answers that are wrong


def symptom(kind: str) -> str:
    return SYMPTOM.get(kind, "value")


def judge(cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
    """Compares the last box with the answer as text."""
    return [_judge(task, done) for task, done in cases]


def _judge(task: Task, done: Completion) -> Verdict:
    _, box, rest = done.text.rpartition("\\boxed{")
    answer = bare(rest.partition("}")[0] if box else done.text.split("=")[-1].strip())
    right = answer == bare(task.answer)
    if done.finish_reason == "length":
        return Verdict(Outcome.FAIL, 0.0, "truncated", method="")
    if not box:
        return Verdict(Outcome.FAIL, 0.0, "no_answer", answer, "", value_correct=right)
    if not right:
        return Verdict(Outcome.FAIL, 0.0, "wrong_answer", answer, "boxed")
    return Verdict(Outcome.PASS, 1.0, "", answer, "boxed", value_correct=True)


def bare(answer: str) -> str:
    """An answer without its unit."""
    return re.sub(r" [a-z]+$", "", answer)


class Student:
    """Answers tasks; ``defects`` are the shares of answers spoilt by (skill, kind)."""

    def __init__(self, defects: Mapping[tuple[str, str], float]):
        self.defects = dict(defects)

    def sample(self, tasks: list[Task], count: int, seed: int) -> list[RolloutGroup]:
        rng = random.Random(seed)
        groups = []
        for task in tasks:
            done = tuple(self._answer(task, rng) for _ in range(count))
            verdicts = judge([(task, completion) for completion in done])
            groups.append(RolloutGroup(task, (1,), done, tuple(verdicts)))
        return groups

    def _answer(self, task: Task, rng: random.Random) -> Completion:
        luck = rng.random()
        for (skill, kind), share in self.defects.items():
            if skill == task.skill and luck < share:
                return _spoilt(task, kind)
        slip = rng.random() < SLIPS
        return _spoilt(task, rng.choice(KINDS)) if slip else _done(task.solution)


def _spoilt(task: Task, kind: str) -> Completion:
    if kind == "format":
        return _done(f"The answer = {task.answer}")
    if kind == "incomplete":
        return Completion((), (), task.solution[: len(task.solution) // 2], "length")
    return _done(f"\\boxed{{{task.answer}{len(kind)}}}")


def _done(text: str) -> Completion:
    return Completion((), (), text, "stop")


class Characters:
    """As much of a tokenizer as a lab needs."""

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        return tuple(range(len(prompt)))


def make_lab(student: Student, round_: int = 1, reserved: Sequence[Task] = ()) -> Laboratory:
    """A real lab around a scripted student."""

    class Verifier:
        def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
            return judge(cases)

    admission = Admission(judge, reserved)
    return Laboratory(
        7, round_, SUITE, admission, (), student.sample, Verifier(), Characters(), 2000
    )


def diagnose(student: Student, number: int = 1, tasks: int = 4, seed: int = 0) -> Diagnosis:
    """Evidence and failures of every cell."""
    drawn = {
        task.key: task
        for cell in SUITE.cells()
        for i in range(tasks)
        for task in [SUITE.draw(cell, 1000 * seed + i, "train")]
    }
    groups = student.sample(list(drawn.values()), 4, seed)
    evidence = tuple(count_evidence(groups, ("boxed",)))
    return Diagnosis(number, evidence, 0.5, 0.5, tuple(failed_samples(groups)))


def make_curator(url: str = "", **llm: Any) -> LlmCurator:
    """A curator over the suite; without a URL it has no endpoint."""
    endpoints = (f"teacher {url} model=curator input=0.35 output=0.75",) if url else ()
    settings = {"endpoints": endpoints, "claims": 30, **llm}
    config = CuratorConfig(kind="llm", llm=CuratorLlmConfig(**settings))
    return LlmCurator(config, ProceduralCurator(config, SUITE.cells(), 8, 4), 7)


class Teacher:
    """Answers as a strong model that also invents: an ``act`` for ``OpenAiServer``.

    Args:
      inventions: claims that it adds without any reason.
    """

    def __init__(self, inventions: int = 0, seed: int = 0):
        self._inventions, self._rng = inventions, random.Random(seed)
        self.claims: list[dict[str, Any]] = []
        self.prompts: list[str] = []

    def __call__(self, exchange: Exchange) -> None:
        text = self.reply(exchange.body)
        usage = {"prompt_tokens": len(exchange.text) // 4, "completion_tokens": len(text) // 4}
        exchange.respond(200, json.dumps(completion(text, usage=usage)).encode())

    def reply(self, body: Mapping[str, Any]) -> str:
        self.prompts.append(body["messages"][1]["content"])
        data = json.loads(body["messages"][1]["content"])["data"]
        if "failures" in data:
            return json.dumps({"weaknesses": self._analyse(data["failures"])})
        if "arms" in data:
            return json.dumps(self._propose(data))
        return json.dumps({"tasks": self._write(data)})

    def _analyse(self, failures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        kinds = {"no_answer": "format", "truncated": "incomplete", "wrong_answer": "logic"}
        cited: dict[tuple[str, str], list[str]] = {}
        for failure in failures:
            cited.setdefault((failure["skill"], kinds[failure["category"]]), []).append(
                failure["id"]
            )
        self.claims = [
            _claim(skill, kind, ids, len(ids) / len(failures))
            for (skill, kind), ids in cited.items()
            if len(ids) >= 6
        ]
        for _ in range(self._inventions):
            skill, kind = self._rng.choice(SKILLS), self._rng.choice(KINDS)
            ids = [f["id"] for f in failures if f["skill"] == skill] or [failures[0]["id"]]
            self.claims.append(_claim(skill, kind, ids[:3], self._rng.random()))
        return self.claims

    def _propose(self, data: Mapping[str, Any]) -> dict[str, Any]:
        names = [arm["strategy"] for arm in data["arms"]]
        return {
            "strategy": "targeted" if "targeted" in names else names[0],
            "focus": [weakness["skill"] for weakness in data["weaknesses"]],
            "difficulty": 0.25,
            "learning_rate_scale": 1.0,
            "num_tasks": 8,
        }

    def _write(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        skill = data["weakness"]["skill"]
        tasks = [SUITE.draw(f"{skill}/1", 5000 + i, "train") for i in range(data["order"]["tasks"])]
        return [
            {
                "prompt": f"In other words, {task.prompt.partition('Put the final')[0].strip()}",
                "domain": "math",
                "answer": bare(task.answer),
                "reference_solution": task.solution,
                "difficulty": 0.2,
                "skill": skill,
            }
            for task in {task.key: task for task in tasks}.values()
        ]


def _claim(skill: str, kind: str, ids: Sequence[str], severity: float) -> dict[str, Any]:
    return {
        "skill": skill,
        "kind": kind,
        "evidence_task_ids": sorted(set(ids))[:8],
        "severity": round(min(severity, 1.0), 3),
        "rationale": f"{len(ids)} answers",
    }
