"""What models answer reaches who asked, parsed, each in its place."""

import functools
import json

import pytest
from client_fixtures import make_client
from openai_server import OpenAiServer, answer, error

from cosr_jax.curator import prompts
from cosr_jax.curator.calls import CallError
from cosr_jax.curator.consult import consult, consult_each, remembering
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.schemas import Context
from cosr_jax.types import Completion, Outcome, Task, Verdict

FAILURE = Failure("id0", "addition", 0.2, "1 + 1?", "2", "3", "wrong_answer", "")
CONTEXT = Context(known_skills=["addition"], max_items=5)
CLAIM = {
    "skill": "addition",
    "kind": "arithmetic",
    "evidence_task_ids": ["id0"],
    "severity": 0.5,
    "rationale": "Off by one.",
}


def build(max_tokens):
    return prompts.analyst([FAILURE], (), CONTEXT, max_tokens, seed=0)


@pytest.fixture
def server():
    with OpenAiServer(answer(json.dumps({"weaknesses": [CLAIM]}))) as running:
        yield running


def test_each_endpoint_is_asked_for_itself_and_may_fail_for_itself(server):
    with OpenAiServer(error(400, "no")) as other:
        client = make_client(server.url, other.url)
        first, second, either = consult_each(client, build, 12_000, (("a",), ("b",), ("b", "a")))
    assert first.result.value == {"weaknesses": [CLAIM]} and first.endpoint == "a"
    assert isinstance(second, CallError) and second.reason == "http_400"
    assert either.endpoint == "a"


def test_consulting_one_raises_what_went_wrong(server):
    assert consult(make_client(server.url), build, 12_000).endpoint == "a"
    server.otherwise = error(400, "no")
    with pytest.raises(CallError, match="http_400"):
        consult(make_client(server.url), build, 12_000)


def test_a_judge_that_remembers_is_asked_about_each_case_once():
    asked = []

    def judge(cases):
        asked.append([completion.text for _, completion in cases])
        return [Verdict(Outcome.PASS, float(completion.text)) for _, completion in cases]

    task = Task("math", "addition", 0.2, "1 + 1?", "2", "2")
    done = functools.partial(Completion, (), (), finish_reason="stop")
    judged = remembering(judge)
    assert [v.reward for v in judged([(task, done(text="1")), (task, done(text="0"))])] == [1, 0]
    again = judged([(task, done(text="0")), (task, done(text="0.5")), (task, done(text="1"))])
    assert [verdict.reward for verdict in again] == [0, 0.5, 1]
    assert asked == [["1", "0"], ["0.5"]]
    judged([(task, done(text="1"))])
    assert len(asked) == 2
