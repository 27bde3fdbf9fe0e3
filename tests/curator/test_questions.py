"""From prompt to parsed value over a real server, with answers good, bad and too long."""

import json

import pytest
from client_fixtures import make_client
from openai_server import OpenAiServer, answer, error

from cosr_jax.curator import prompts
from cosr_jax.curator.calls import CallError, Reply
from cosr_jax.curator.failures import Failure
from cosr_jax.curator.parsing import parse
from cosr_jax.curator.prompts import LEAST_TOKENS
from cosr_jax.curator.questions import accepting, question
from cosr_jax.curator.schemas import Context

FAILURES = [
    Failure(f"id{i}", "addition", 0.2, f"{i} + {i}?", str(2 * i), "7 " * 200, "wrong_answer", "")
    for i in range(60)
]
CONTEXT = Context(known_skills=["addition"], known_strategies=["review"], max_items=5)


def build(max_tokens):
    return prompts.analyst(FAILURES, (), CONTEXT, max_tokens, seed=0)


def analysis(*ids):
    weakness = {
        "skill": "addition",
        "kind": "arithmetic",
        "evidence_task_ids": list(ids),
        "severity": 0.5,
        "rationale": "Always 7.",
    }
    return json.dumps({"weaknesses": [weakness]})


@pytest.fixture
def server():
    with OpenAiServer(answer("{}")) as running:
        yield running


def test_a_claim_without_evidence_is_asked_for_again_and_then_kept(server):
    prompt = build(12_000)
    shown = sorted(prompt.context.known_task_ids)
    server.play(answer(analysis("id-invented")), answer(analysis(shown[0], "id-invented")))
    client = make_client(server.url)
    reply = client.ask(question(build, 12_000))
    result = parse("analysis", reply, prompt.context)
    assert [w["evidence_task_ids"] for w in result.value["weaknesses"]] == [[shown[0]]]
    assert result.dropped_ids == ("id-invented",)
    assert client.stats()["rejected/all_dropped"] == 1
    assert "evidence_task_ids cites no known id" in server.requests[1]["messages"][-1]["content"]


def test_no_weakness_is_a_good_answer(server):
    server.otherwise = answer('{"weaknesses": []}')
    assert make_client(server.url).ask(question(build, 12_000)).attempts == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("I could not find any.", "not_json"),
        ('{"weaknesses": 5}', "schema"),
        ("<!doctype html><html></html>", "html"),
        ("x" * 1_000_001, "too_large"),
        ("<|channel|>analysis<|message|>let me see", "no_final"),
    ],
)
def test_an_answer_that_stays_unusable_fails_as_the_parser_says(server, content, kind):
    server.otherwise = answer(content)
    with pytest.raises(CallError) as caught:
        make_client(server.url).ask(question(build, 12_000))
    assert (caught.value.kind, caught.value.reason) == (kind, "rejected")
    assert len(server.requests) == 3


def test_fewer_failures_for_a_model_with_less_room(server):
    def small(exchange):
        size = len(exchange.body["messages"][1]["content"])
        act = answer('{"weaknesses": []}') if size < 14_000 else error(400, "context length")
        act(exchange)

    server.otherwise = small
    client = make_client(server.url)
    assert isinstance(client.ask(question(build, 16_000)), Reply)
    sizes = [len(r["messages"][1]["content"]) for r in server.requests]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) >= 2
    assert client.stats()["shortened"] == len(sizes) - 1


def test_shortening_ends(server):
    server.otherwise = error(400, "context length")
    with pytest.raises(CallError) as caught:
        make_client(server.url).ask(question(build, 4 * LEAST_TOKENS))
    assert caught.value.reason == "context_overflow"
    assert len(server.requests) == 3


@pytest.mark.parametrize("role", ["analyst", "planner", "author"])
def test_the_example_in_the_prompt_is_an_answer_that_the_parser_takes(role):
    weakness = json.loads(analysis("id0"))["weaknesses"][0]
    arms = [prompts.ArmReport("review", "What was trained and has fallen.", 1, 0.01)]
    prompt = {
        "analyst": lambda: build(12_000),
        "planner": lambda: prompts.planner([weakness], arms, (), CONTEXT, 12_000),
        "author": lambda: prompts.author(
            "targeted", weakness, FAILURES, 4, 0.3, CONTEXT, 12_000, seed=0
        ),
    }[role]()
    example = prompt.request.messages[0].content.splitlines()[-1]
    shown = next(iter(prompt.context.known_task_ids), "")
    for placeholder, value in (("SKILL", "addition"), ("STRATEGY", "review"), ("ID", shown)):
        example = example.replace(f'"{placeholder}"', json.dumps(value))
    content = json.loads(example)
    if role == "author":  # of a code task the verifier is asked, which is not here
        content["tasks"] = [task for task in content["tasks"] if task["domain"] == "math"]
    schema = {"analyst": "analysis", "planner": "plan", "author": "tasks"}[role]
    with OpenAiServer(answer(json.dumps(content))) as server:
        reply = make_client(server.url).ask(question(lambda _: prompt, 12_000))
    assert reply.attempts == 1
    result = parse(schema, reply, prompt.context)
    assert (result.error, result.dropped) == ("", 0)
    assert accepting(schema, prompt.context)(reply) is None


def test_the_code_in_the_authors_example_passes_its_tests():
    (task,) = [t for t in prompts._EXAMPLES["author"]["tasks"] if t["domain"] == "code"]
    names: dict = {}
    exec(task["reference_solution"], names)
    for test in task["tests"]:
        exec(test, names)
