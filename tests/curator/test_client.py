"""What the client makes of answers: routes, limits, downgrades, second questions, state."""

import asyncio
import dataclasses
import json
import os
import signal
import sys
import threading
import time

import openai_server as server_acts
import pytest
from client_fixtures import REQUEST, SkippingClock, make_client, must_be_long, outcome
from openai_server import OpenAiServer, after, answer, error, refused_url

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.calls import CallError, Charge, Message, Question, Reply, Request
from cosr_jax.curator.client import Client
from cosr_jax.types import UserError

GOOD = '{"weaknesses": []}'
UP = error(500, "broken")


@pytest.fixture
def server():
    with OpenAiServer(answer(GOOD)) as running:
        yield running


@pytest.fixture
def second():
    with OpenAiServer(answer("from the second")) as running:
        yield running


def numbered(count, **fields):
    return [Question(dataclasses.replace(REQUEST, sample=i, **fields)) for i in range(count)]


# --- endpoints and roles


def test_an_endpoint_that_fails_is_followed_by_the_next(server, second):
    server.otherwise = UP
    client = make_client(server.url, second.url, max_attempts=2)
    reply = outcome(client)
    assert (reply.content, reply.endpoint, reply.attempts) == ("from the second", "b", 3)
    assert client.stats()["failover/b"] == 1


@pytest.mark.parametrize("act", [error(401, "no"), error(404, "no"), error(400, "no")])
def test_a_refusal_goes_to_the_next_endpoint_at_once(server, second, act):
    server.otherwise = act
    clock = SkippingClock()
    assert outcome(make_client(server.url, second.url, clock=clock)).endpoint == "b"
    assert clock.waits == []


def test_roles_go_to_their_endpoints_in_order(server, second):
    client = make_client(server.url, second.url, roles=("author = b, a", "checker=b"))
    request = dataclasses.replace(REQUEST, role="author")
    assert outcome(client, request).endpoint == "b"
    assert outcome(client).endpoint == "a"
    second.otherwise = UP
    assert outcome(client, request).endpoint == "a"
    assert isinstance(outcome(client, dataclasses.replace(REQUEST, role="checker")), CallError)


def test_an_error_tells_what_every_endpoint_did(server):
    server.otherwise = UP
    with refused_url() as url:
        failure = outcome(make_client(server.url, url, max_attempts=1))
    assert failure.reason == "connection"
    assert "a: http_500: HTTP 500: broken; b: connection" in failure.detail


def test_one_lost_endpoint_costs_its_failures_once(server):
    with refused_url() as url:
        client = make_client(url, server.url)
        outcomes = client.ask_all(numbered(20))
    assert all(isinstance(o, Reply) and o.endpoint == "b" for o in outcomes)
    assert client.stats()["attempts_failed/connection"] <= 5 + client.config.concurrency


def test_a_missing_key_is_named_at_the_start(monkeypatch):
    monkeypatch.delenv("CURATOR_KEY", raising=False)
    with pytest.raises(UserError, match="CURATOR_KEY"):
        make_client("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 key=CURATOR_KEY")


def test_a_missing_package_is_named_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="openai"):
        make_client("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoints": ()}, "names no server"),
        ({"mode": "cache"}, "folder"),
        ({"mode": "replay"}, "folder"),
        ({"roles": ("author=x",)}, "'x'"),
    ],
)
def test_a_config_that_contradicts_itself(settings, words):
    config = CuratorLlmConfig(**{"endpoints": ("a http://127.0.0.1:1/v1",), **settings})
    with pytest.raises(UserError, match=words):
        Client(config)


# --- downgrades


@pytest.mark.parametrize(
    ("message", "more", "given_up", "sent"),
    [
        ("Unsupported parameter", {"param": "response_format"}, "response_format", None),
        ("json_schema is not supported by this model", {}, "response_format", None),
        ("Failed to parse grammar", {}, "response_format", None),
        ("Unrecognized request argument supplied: reasoning_effort", {}, "reasoning_effort", None),
        ('"smollm" does not support thinking', {}, "reasoning_effort", None),
        (
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            {"param": "max_tokens"},
            "max_tokens",
            "max_completion_tokens",
        ),
        ("max_completion_tokens must be used", {}, "max_tokens", "max_completion_tokens"),
        ("Unrecognized request argument supplied: top_k", {}, "top_k", None),
        ("extra fields not permitted: min_p", {}, "min_p", None),
        ("temperature does not support 1.0 with this model", {}, "temperature", None),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_parameter_that_is_refused_is_given_up_once(
    server, message, more, given_up, sent, status, caplog
):
    server.play(error(status, message, **more))
    client = make_client(server.url)
    assert outcome(client).content == GOOD
    assert outcome(client).content == GOOD
    first, *rest = server.requests
    assert given_up in first and len(rest) == 2
    for body in rest:
        assert set(first) - set(body) == {given_up}
        assert set(body) - set(first) == ({sent} if sent else set())
    assert client.stats()[f"downgraded/{given_up}"] == 1
    assert f"refuses {given_up}" in caplog.text


def test_a_host_that_refuses_everything_in_turn_is_still_asked(server):
    names = ["response_format", "reasoning_effort", "min_p", "top_k", "temperature", "top_p"]
    server.play(*(error(400, f"unknown field {name}", param=name) for name in names))
    reply = outcome(make_client(server.url, max_attempts=1))
    assert isinstance(reply, Reply)
    assert set(server.requests[-1]) == {"model", "messages", "max_tokens"}


def test_a_parameter_refused_again_is_no_second_downgrade(server):
    server.otherwise = error(400, "max_tokens is not for this model", param="max_tokens")
    failure = outcome(make_client(server.url))
    assert (failure.reason, len(server.requests)) == ("http_400", 2)


def test_calls_under_way_while_a_parameter_is_given_up_are_repeated(server):
    def picky(exchange):
        act = error(400, "no response_format") if "response_format" in exchange.body else None
        after(0.1, act or answer(GOOD))(exchange)

    server.otherwise = picky
    client = make_client(server.url, max_attempts=1)
    assert all(isinstance(o, Reply) for o in client.ask_all(numbered(8)))
    assert client.stats()["downgraded/response_format"] == 1


def test_a_prompt_quoted_in_an_error_does_not_cost_a_parameter(server):
    server.otherwise = error(400, "messages: bad input: " + "x" * 600 + " top_k response_format")
    client = make_client(server.url)
    assert outcome(client).reason == "http_400"
    assert not any(name.startswith("downgraded") for name in client.stats())


# --- answers that were cut, and second questions


def test_an_answer_that_was_cut_is_asked_for_once_more_with_more_room(server):
    server.play(answer('{"weaknesses": [', finish_reason="length"))
    client = make_client(server.url)
    assert outcome(client).content == GOOD
    first, again = server.requests
    assert (again["max_tokens"], again["reasoning_effort"]) == (2 * first["max_tokens"], "low")
    assert again["messages"] == first["messages"]


def test_an_answer_that_is_cut_twice_is_handed_on_for_salvage(server):
    server.play(answer("one", finish_reason="length"), answer("two", finish_reason="length"))
    reply = outcome(make_client(server.url))
    assert (reply.content, reply.finish_reason, reply.attempts) == ("two", "length", 2)


def test_half_an_answer_is_better_than_a_failure_after_it(server):
    server.play(answer("half", finish_reason="length"), answer(None, finish_reason="length"))
    assert outcome(make_client(server.url)).content == "half"
    server.play(answer("half", finish_reason="length"), UP)
    reply = outcome(make_client(server.url))
    assert (reply.content, reply.attempts, reply.spent.calls) == ("half", 2, 2)


def test_nothing_but_thinking_twice_is_truncated(server):
    server.otherwise = answer(None, reasoning="so then", finish_reason="length")
    failure = outcome(make_client(server.url))
    assert (failure.kind, failure.attempts) == ("truncated", 2)


@pytest.mark.parametrize("content", [GOOD + "\n" * 5_000, "[]", '"text"'])
def test_a_whole_answer_whose_blanks_were_cut_is_whole(server, content):
    server.play(answer(content, finish_reason="length"))
    assert outcome(make_client(server.url)).attempts == 1


def test_a_rejected_answer_is_asked_for_again_with_what_is_wrong(server):
    server.play(answer("bad"), answer("<|x"))
    reply = outcome(make_client(server.url), accept=must_be_long)
    assert (reply.content, reply.attempts) == (GOOD, 3)
    turns = server.requests[2]["messages"]
    assert [t["role"] for t in turns] == [
        "system", "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert turns[2]["content"] == "bad" and "it is too short" in turns[3]["content"]
    assert turns[4]["content"] == "< |x", "control tokens that leaked are not sent back"


def test_a_model_is_asked_again_twice_at_most(server):
    server.otherwise = answer("bad")
    client = make_client(server.url)
    failure = outcome(client, accept=must_be_long)
    assert (failure.kind, failure.reason, failure.attempts) == ("schema", "rejected", 3)
    assert client.stats()["rejected/schema"] == 3


def test_a_cut_answer_that_is_rejected_is_not_asked_for_a_third_time(server):
    server.otherwise = answer("x", finish_reason="length")
    failure = outcome(make_client(server.url), accept=must_be_long)
    assert (failure.reason, failure.attempts) == ("rejected", 2)


def test_a_refusal_that_is_rejected_is_quoted(server):
    server.play(answer(None, refusal="I had rather not"))
    assert outcome(make_client(server.url), accept=must_be_long).content == GOOD
    assert server.requests[1]["messages"][2]["content"] == "I had rather not"


def test_what_one_model_gets_wrong_the_next_may_get_right(server, second):
    server.otherwise = answer("bad")
    reply = outcome(make_client(server.url, second.url), accept=must_be_long)
    assert reply.endpoint == "b"
    assert len(second.requests[0]["messages"]) == 2, "it starts from the question"


def test_a_long_rejected_answer_is_not_sent_back_whole(server):
    server.play(answer("x" * 100_000))
    outcome(
        make_client(server.url),
        accept=lambda reply: (
            must_be_long(dataclasses.replace(reply, content="x"))
            if len(reply.content) > 1_000
            else None
        ),
    )
    assert len(server.requests[1]["messages"][2]["content"]) == 8_000


def test_a_prompt_too_long_for_the_model_is_shortened_by_its_author(server):
    overflow = error(400, "maximum context length is 100 tokens")
    server.play(overflow, overflow)

    def question(size):
        request = Request("analyst", (Message("user", "x" * size),))
        return Question(request, shorter=lambda: question(size // 2) if size > 10 else None)

    client = make_client(server.url)
    assert client.ask(question(80)).content == GOOD
    assert [len(r["messages"][0]["content"]) for r in server.requests] == [80, 40, 20]
    server.otherwise = overflow
    with pytest.raises(CallError) as caught:
        client.ask(question(80))
    assert caught.value.reason == "context_overflow"


def test_the_answer_gets_what_the_context_leaves(server):
    client = make_client(f"{server.url} context=2000")
    assert isinstance(outcome(client), Reply)
    assert server.requests[0]["max_tokens"] == 2000 - REQUEST.prompt_tokens
    long = Request("analyst", (Message("user", "x" * 9_000),))
    assert outcome(client, long).reason == "context_overflow"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 8400 tokens",
        "'max_tokens' is too large: 8192. This model's maximum context length is 2048 tokens and "
        "your request has 90 input tokens (8192 > 2048 - 90).",
        "request (8400 tokens) exceeds the available context size (2048 tokens)",
        "max_tokens=8192 cannot be greater than max_model_len=2048. Please request fewer output "
        "tokens. (parameter=max_tokens, value=8192)",
        "Input length (8400) exceeds model's maximum context length (2048).",
    ],
)
def test_a_context_shorter_than_configured_is_learnt_once(server, message):
    server.play(*[after(0.05, error(400, message))] * 3)
    client = make_client(server.url, max_attempts=1)
    assert all(isinstance(o, Reply) for o in client.ask_all(numbered(3)))
    assert {r["max_tokens"] for r in server.requests[3:]} == {2048 - REQUEST.prompt_tokens}
    assert client.stats()["downgraded/context"] == 1
    other = make_client(server.url)
    other.load_state_dict(json.loads(json.dumps(client.state_dict())))
    outcome(other)
    assert server.requests[-1]["max_tokens"] == 2048 - REQUEST.prompt_tokens


def test_shortening_prompts_does_not_stretch_the_deadline(server):
    clock = SkippingClock()

    def overflow(exchange):
        clock.waits.append(200.0)  # each overflow takes a while
        error(400, "context length exceeded")(exchange)

    server.otherwise = overflow

    def question():
        return Question(REQUEST, shorter=question)

    with pytest.raises(CallError) as caught:
        make_client(server.url, clock=clock).ask(question())
    assert (caught.value.reason, len(server.requests)) == ("deadline", 3)


def test_a_call_that_came_late_says_nothing_about_the_server(server):
    clock = SkippingClock()

    def slow(exchange):
        clock.waits.append(59.7)  # of the minute that both questions have
        answer(GOOD)(exchange)

    server.play(slow)
    server.otherwise = server_acts.silent
    settings = {"concurrency": 1, "deadline_s": 60.0, "breaker_failures": 1}
    outcomes = (client := make_client(server.url, clock=clock, **settings)).ask_all(numbered(2))
    assert isinstance(outcomes[0], Reply) and outcomes[1].reason == "deadline"
    assert client.stats()["breaker_open/a"] == 0


# --- limits


def test_no_more_requests_at_once_than_configured(server):
    gathering = threading.Barrier(3)  # no answer before three requests are in hand

    def together(exchange):
        gathering.wait(120)
        after(0.03, answer(GOOD))(exchange)

    server.otherwise = together
    client = make_client(server.url, concurrency=3)
    assert all(isinstance(o, Reply) for o in client.ask_all(numbered(12)))
    assert server.at_once == 3


def test_outcomes_come_in_the_order_of_the_questions(server):
    def echo(exchange):
        number = int(exchange.body["messages"][0]["content"])
        after(0.05 * (number % 3), answer(str(number)))(exchange)

    server.otherwise = echo
    questions = [Question(Request("analyst", (Message("user", str(i)),))) for i in range(16)]
    client = make_client(server.url, concurrency=16)
    assert [o.content for o in client.ask_all(questions)] == [str(i) for i in range(16)]


def test_a_server_that_keeps_failing_is_left_alone_and_then_tested_once(server):
    clock = SkippingClock()
    server.otherwise = UP
    client = make_client(server.url, clock=clock, max_attempts=5)
    assert outcome(client).reason == "http_500"
    assert len(server.requests) == 5
    assert {outcome(client).reason for _ in range(3)} == {"breaker_open"}
    assert len(server.requests) == 5, "nothing is sent"
    assert client.stats()["breaker_open/a"] == 1
    clock.waits.append(60.0)
    outcomes = client.ask_all(numbered(4))
    assert [o.reason for o in outcomes] == ["http_500", *["breaker_open"] * 3]
    assert len(server.requests) == 6, "one probe"
    assert [o.attempts for o in outcomes] == [1, 0, 0, 0]
    clock.waits.append(60.0)
    server.otherwise = after(0.05, answer(GOOD))
    outcomes = client.ask_all(numbered(4))
    assert [o.content for o in outcomes] == [GOOD] * 4, "the others wait for what the probe finds"
    assert client.stats()["breaker_open/a"] == 0


def test_slips_of_the_model_do_not_open_the_breaker(server):
    server.otherwise = answer(None, reasoning="hm")
    client = make_client(server.url)
    for _ in range(3):
        assert outcome(client).kind == "no_final"
    assert len(server.requests) == 15


def test_a_budget_of_calls_ends_them(server):
    client = make_client(server.url, calls_per_run=3)
    outcomes = client.ask_all(numbered(5))
    refused = [o for o in outcomes if isinstance(o, CallError)]
    assert {o.reason for o in refused} == {"budget_calls_per_run"}
    assert (len(refused), len(server.requests)) == (2, 3)
    assert refused[0].kind == "transport"


def test_a_retry_needs_budget_too(server):
    server.otherwise = UP
    failure = outcome(make_client(server.url, calls_per_run=2))
    assert (failure.reason, len(server.requests)) == ("budget_calls_per_run", 2)


def test_a_new_round_brings_its_own_budget(server):
    client = make_client(server.url, calls_per_round=1, calls_per_run=2)
    for number, expected in ((1, GOOD), (1, None), (2, GOOD), (3, None)):
        client.start_round(number)
        found = outcome(client)
        assert (found.content if isinstance(found, Reply) else None) == expected
    assert found.reason == "budget_calls_per_run"


def test_concurrent_calls_never_spend_more_than_there_is(server):
    """Each costs up to about 1,300 tokens and 300 in fact: as many as fit are let through."""
    server.otherwise = after(
        0.02, answer(GOOD, usage={"prompt_tokens": 200, "completion_tokens": 100})
    )
    client = make_client(server.url, tokens_per_run=3_000, concurrency=16)
    outcomes = client.ask_all(numbered(16, max_tokens=1_000))
    spent = client.budget.spent_in_run.tokens
    answered = sum(isinstance(o, Reply) for o in outcomes)
    assert spent == 300 * answered <= 3_000
    assert answered >= 5, "what was set aside and not used is given back"
    assert {o.reason for o in outcomes if isinstance(o, CallError)} == {"budget_tokens_per_run"}


def test_money_is_charged_by_the_endpoints_prices(server, second):
    usage = {"prompt_tokens": 1_000, "completion_tokens": 200}
    server.otherwise = answer(GOOD, usage=usage)
    client = make_client(f"{server.url} input=0.15 output=0.6", dollars_per_run=0.007)
    reply = outcome(client)
    assert reply.spent.dollars == pytest.approx(1_000 * 0.15e-6 + 200 * 0.6e-6)
    found = [outcome(client) for _ in range(9)]
    spent = client.budget.spent_in_run.dollars
    assert 0.007 - 8192 * 0.6e-6 - 0.001 < spent <= 0.007
    assert found[-1].reason == "budget_dollars_per_run"


def test_an_endpoint_without_price_serves_when_the_money_is_spent(server, second):
    client = make_client(f"{server.url} output=1000", second.url, dollars_per_run=0.01)
    assert outcome(client).endpoint == "b"
    assert server.requests == []


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": 3},
        {"prompt_tokens": -1, "completion_tokens": 3},
        {"prompt_tokens": 1.5, "completion_tokens": 3},
        {"prompt_tokens": True, "completion_tokens": 3},
        {"prompt_tokens": 10**12, "completion_tokens": 3},
        {"prompt_tokens": 0, "completion_tokens": 0},
        "many",
    ],
)
def test_without_a_usage_tokens_are_counted_from_the_text(server, usage):
    server.otherwise = answer("x" * 300, reasoning="y" * 30, usage=usage)
    client = make_client(server.url)
    reply = outcome(client)
    assert reply.usage.is_estimated
    assert (reply.usage.completion_tokens, reply.usage.reasoning_tokens) == (110, 10)
    assert reply.usage.prompt_tokens == REQUEST.prompt_tokens
    assert client.budget.spent_in_run.tokens == 110 + REQUEST.prompt_tokens
    assert client.stats()["usage_estimated"] == 1


def test_reasoning_tokens_are_told_apart(server):
    details = {"reasoning_tokens": 30}
    usage = {"prompt_tokens": 9, "completion_tokens": 50, "completion_tokens_details": details}
    server.otherwise = answer(GOOD, usage=usage)
    client = make_client(server.url)
    assert outcome(client).usage.reasoning_tokens == 30
    assert client.stats()["tokens/analyst/reasoning"] == 30
    assert client.stats()["tokens/analyst/completion"] == 50


def test_all_attempts_of_a_call_are_charged(server):
    server.play(answer(None), answer("half", finish_reason="length"), UP)
    reply = outcome(make_client(server.url))
    assert reply.spent == Charge(calls=3, prompt_tokens=200, completion_tokens=100)


# --- the machinery around


def test_a_finished_call_is_told_in_one_record(server):
    records = []
    client = make_client(server.url, on_call=records.append, max_attempts=2)
    server.play(UP)
    outcome(client)
    server.otherwise = UP
    outcome(client)
    good, bad = records
    json.dumps(records)
    assert good["trail"] == ["a: http_500: HTTP 500: broken", "a: stop"]
    assert (good["role"], good["endpoint"], good["model"]) == ("analyst", "a", "served")
    assert len(good["key"]) == 64 and len(good["schema"]) == 16
    assert "content" not in good and good["usage"]["completion_tokens"] == 50
    assert (bad["kind"], bad["reason"], bad["attempts"]) == ("server_error", "http_500", 2)


def test_one_question_raises_its_error(server):
    server.otherwise = error(400, "no")
    with pytest.raises(CallError) as caught:
        make_client(server.url).ask(Question(REQUEST))
    assert CallError.from_dict(caught.value.to_dict()).to_dict() == caught.value.to_dict()


def test_a_session_serves_a_running_loop(server):
    async def main(client):
        async with client.session() as session:
            return await asyncio.gather(*(session.ask(q) for q in numbered(5)))

    replies = asyncio.run(main(make_client(server.url)))
    assert [r.content for r in replies] == [GOOD] * 5


def test_a_mistake_in_the_acceptance_rule_is_not_swallowed(server):
    with pytest.raises(ZeroDivisionError):
        outcome(make_client(server.url), accept=lambda reply: 1 / 0)


def test_an_interrupt_ends_the_calls_and_gives_back_what_they_reserved(server):
    server.otherwise = server_acts.silent
    client = make_client(server.url, tokens_per_run=200_000)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            client.ask_all(numbered(6))
    finally:
        timer.cancel()
    server.otherwise = answer(GOOD)
    assert all(isinstance(o, Reply) for o in client.ask_all(numbered(6)))


def test_state_goes_on_where_it_was(server):
    server.play(error(400, "no top_k"))
    client = make_client(server.url, tokens_per_run=9_000, calls_per_round=40)
    client.start_round(3)
    outcome(client)
    server.otherwise = UP
    outcome(client)
    state = json.loads(json.dumps(client.state_dict()))

    other = make_client(server.url, tokens_per_run=9_000, calls_per_round=40)
    other.load_state_dict(state)
    assert other.budget.state_dict() == client.budget.state_dict()
    assert other.stats() == client.stats()
    other.start_round(3)
    assert other.budget.spent_in_round.calls == 7
    sent = len(server.requests)
    assert outcome(other).reason == "breaker_open"
    assert len(server.requests) == sent
    other.clock.waits.append(60.0)
    server.otherwise = answer(GOOD)
    assert outcome(other).content == GOOD
    assert "top_k" not in server.requests[-1]


def test_state_of_endpoints_that_are_gone_is_forgotten(server, second):
    state = make_client(server.url, second.url).state_dict()
    make_client(server.url).load_state_dict(state)
    make_client(server.url, second.url).load_state_dict(make_client(server.url).state_dict())


def test_sixteen_questions_while_the_server_is_killed_and_comes_back():
    questions = numbered(16)
    clock = SkippingClock()
    with OpenAiServer(after(0.05, answer(GOOD))) as server:
        url = server.url
        client = make_client(url, clock=clock, max_attempts=3, deadline_s=200.0)
        assert all(isinstance(o, Reply) for o in client.ask_all(questions))
    started = time.monotonic()
    outcomes = client.ask_all(questions)
    assert time.monotonic() - started < 180.0  # none waits for its deadline
    assert {o.reason for o in outcomes} <= {"connection", "breaker_open"}
    clock.waits.append(60.0)
    with OpenAiServer(answer(GOOD), port=int(url.split(":")[2].split("/")[0])):
        assert isinstance(outcome(client), Reply)
        assert all(isinstance(o, Reply) for o in client.ask_all(questions))
