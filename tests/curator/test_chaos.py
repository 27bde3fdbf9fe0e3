"""Rounds with servers that misbehave at random end in time and train on nothing unproven."""

import json
import math
import random
import time

import openai_server as acts
import pytest
from openai_server import OpenAiServer, completion, error, reply
from scripted_students import (
    SKILLS,
    SUITE,
    Student,
    Teacher,
    diagnose,
    judge,
    make_curator,
    make_lab,
)

from cosr_jax.types import Completion, Outcome

FAULTS = [
    error(429, "slow down", {"Retry-After": "0"}),
    error(500, "HarmonyError: unexpected tokens"),
    error(503, "overloaded"),
    error(400, "bad request"),
    reply(b"<!doctype html><h1>Bad gateway</h1>", 200, {"Content-Type": "text/html"}),
    reply(b'{"error": {"message": "overloaded"}}'),
    reply(b'{"choices": [{"mess'),
    reply(b"[" * 100_000),
    acts.answer(None),
    acts.answer(None, reasoning="so it is"),
    acts.answer("<|start|>assistant<|channel|>fin"),
    acts.answer('{"weaknesses": [{"skill": "add', finish_reason="length"),
    acts.answer(" " * 5_000, finish_reason="length"),
    acts.answer("I'm sorry, but I can't help with that."),
    acts.answer("x" * 1_100_000),
    acts.answer(float("1e300")),
    acts.cut(json.dumps(completion("x" * 100)).encode()),
    acts.reset,
    acts.not_http,
    acts.trickle,
    acts.silent,
]


def framed(text, rng):
    """A good answer as a host may leak it."""
    return rng.choice(
        [
            f"```json\n{text}\n```",
            f"<|channel|>analysis<|message|>hm {{<|end|><|start|>assistant"
            f"<|channel|>final <|constrain|>json<|message|>{text}<|return|>",
            f"analysisWe look at it.assistantfinal{text}",
            f"<think>maybe []</think>\nHere it is:\n{text}\nThat's {{all}}.",
            json.dumps(text),
            "\ufeff" + text.replace("}, {", "},\n// next\n{"),
            text[:-2] + ",]}" if text.endswith("]}") else text,
        ]
    )


def spoilt(text, rng):
    """An answer with items that cannot be kept, or cut."""
    value = json.loads(text)
    key = next((k for k in ("weaknesses", "tasks") if k in value), None)
    if key is None:
        return json.dumps({**value, "learning_rate_scale": 50})
    bad = [
        {"skill": "chess"},
        None,
        {**value[key][0], "severity": 7, "difficulty": 7} if value[key] else 5,
        {**value[key][0], "reference_solution": "\\boxed{-1}", "evidence_task_ids": ["x"]}
        if value[key]
        else [],
    ]
    value[key][rng.randrange(len(value[key]) + 1) :] = bad
    whole = json.dumps(value)
    return whole[: rng.randrange(len(whole) // 2, len(whole))] if rng.random() < 0.3 else whole


class Moody(Teacher):
    """Now and then good, now and then framed or spoilt, and often out of order."""

    def __init__(self, seed):
        super().__init__(inventions=3, seed=seed)
        self._moods = random.Random(seed)

    def __call__(self, exchange):
        mood = self._moods.random()
        if mood < 0.3:
            return self._moods.choice(FAULTS)(exchange)
        text = self.reply(exchange.body)
        if mood < 0.6:
            text = framed(text, self._moods)
        elif mood < 0.8:
            text = spoilt(text, self._moods)
        return exchange.respond(200, json.dumps(completion(text)).encode())


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rounds"), [(1, 2), (2, 10), (3, 10), (4, 10)])
def test_rounds_end_in_time_and_train_on_nothing_unproven(seed, rounds):
    student = Student({("addition", "logic"): 0.5, ("sorting", "format"): 0.6})
    settings = {
        "deadline_s": 1.0,
        "timeout_s": 0.1,
        "max_attempts": 3,
        "breaker_failures": 50,
        "analysts": 2,
    }
    with OpenAiServer(Moody(seed)) as one, OpenAiServer(Moody(seed + 100)) as two:
        curator = make_curator(endpoints=(f"a {one.url}", f"b {two.url}"), **settings)
        for number in range(1, rounds + 1):
            lab = make_lab(student, number)
            diagnosis = diagnose(student, number, seed=number)
            began = time.monotonic()
            plan = curator.plan(diagnosis, lab)
            # Four questions of a second each at most, the lab's own work, and a busy machine.
            assert time.monotonic() - began < 60
            curator.observe_gain(plan, 0.0)
            assert math.isclose(sum(weight for _, weight in plan.mixture), 1.0)
            assert {cell for cell, _ in plan.mixture} <= set(SUITE.cells())
            assert 0.5 <= plan.learning_rate_scale <= 1.5
            assert {task.task_id for task in plan.authored} <= lab.admitted
            assert {task.skill for task in plan.authored} <= set(SKILLS)
            proofs = judge([(t, Completion((), (), t.solution, "stop")) for t in plan.authored])
            assert all(verdict.outcome is Outcome.PASS for verdict in proofs)
    figures = {n.removeprefix("curator/llm/"): v for n, v in curator.figures().items()}

    def total(prefix):
        return sum(value for name, value in figures.items() if name.startswith(prefix))

    # Whatever was not used is counted with its reason.
    assert figures["tasks_written"] == figures["tasks_kept"] + total("tasks_refused/")
    assert figures["claims"] == figures["claims_accepted"] + figures["claims_hallucinated"]
    assert total("attempts_failed/") > 0
    assert (
        total("fallback/") == figures.get("fallbacks", 0.0) < rounds
    )  # it was of use all the same
    assert figures["tasks_kept"] > 0
