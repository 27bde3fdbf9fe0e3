"""Everything that a server can do to the client, over real sockets."""

import json
import re
import socket
import threading
import time

import openai_server as server_acts
import pytest
from client_fixtures import REQUEST, SkippingClock, make_client, must_be_long, outcome
from openai_server import OpenAiServer, answer, completion, error, reply, reply_json

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.calls import KINDS, CallError, Question, Reply
from cosr_jax.curator.client import Client
from cosr_jax.curator.wire import MAX_BODY_BYTES

GOOD = '{"weaknesses": []}'
HTML = reply(b"<!doctype html><h1>Bad gateway</h1>", 200, {"Content-Type": "text/html"})

#: name -> (act, kind, reason); each is retried, and a good answer after it is taken.
RETRIED = {
    "hangs up": (server_acts.reset, "transport", "connection"),
    "cut body": (
        server_acts.cut(json.dumps(completion("x" * 100)).encode()),
        "transport",
        "connection",
    ),
    "cut chunks": (server_acts.cut_chunks(b'{"choices"'), "transport", "connection"),
    "bad chunks": (server_acts.bad_chunks, "transport", "connection"),
    "not http": (server_acts.not_http, "transport", "connection"),
    "408": (error(408, "late"), "server_error", "http_408"),
    "409": (error(409, "conflict"), "server_error", "http_409"),
    "429": (error(429, "slow down"), "server_error", "http_429"),
    "500": (error(500, "HarmonyError: unexpected tokens"), "server_error", "http_500"),
    "502 html": (reply(b"<html>", 502, {"Content-Type": "text/html"}), "server_error", "http_502"),
    "503 empty": (reply(b"", 503), "server_error", "http_503"),
    "html with 200": (HTML, "html", "html"),
    "html said to be json": (reply(b"<html>"), "html", "html"),
    "empty body": (reply(b""), "empty", "empty_body"),
    "blank body": (reply(b" \n\n"), "empty", "empty_body"),
    "cut json": (reply(b'{"choices": [{"mess'), "not_json", "bad_json"),
    "two values": (reply(b"{}{}"), "not_json", "bad_json"),
    "stream events": (reply(b'data: {"choices": []}\n\n'), "not_json", "bad_json"),
    "latin-1": (reply(b'{"choices": "\xe9"}'), "not_json", "not_utf8"),
    "deep nesting": (reply(b"[" * 200_000), "not_json", "bad_json"),
    "huge number": (reply(b'{"a": ' + b"9" * 10_000 + b"}"), "not_json", "bad_json"),
    "compressed": (
        reply(b"\x1f\x8b\x08\x00", 200, {"Content-Encoding": "gzip"}),
        "not_json",
        "compressed",
    ),
    "a string": (reply_json("hello"), "schema", "bad_envelope"),
    "a list": (reply_json([]), "schema", "bad_envelope"),
    "no choices": (reply_json({"id": "x"}), "schema", "no_choices"),
    "choices null": (reply_json({"choices": None}), "schema", "no_choices"),
    "choices empty": (reply_json({"choices": []}), "schema", "no_choices"),
    "choice a string": (reply_json({"choices": ["x"]}), "schema", "no_message"),
    "no message": (reply_json({"choices": [{}]}), "schema", "no_message"),
    "content a number": (answer(5), "schema", "bad_content"),
    "content an object": (answer({"weaknesses": []}), "schema", "bad_content"),
    "content an image": (answer([{"type": "image"}]), "schema", "bad_content"),
    "error with 200": (
        reply_json({"error": {"message": "overloaded"}}),
        "server_error",
        "error_in_200",
    ),
    "duplicate keys": (reply(b'{"choices": [], "choices": [{}]}'), "ambiguous", "duplicate_keys"),
    "duplicate keys within": (
        reply(b'{"choices": [{"message": {"content": "a", "content": "b"}}]}'),
        "ambiguous",
        "duplicate_keys",
    ),
    "given up": (answer("half", finish_reason="abort"), "server_error", "aborted"),
    "null content": (answer(None), "empty", "empty"),
    "blank content": (answer(" \n"), "empty", "empty"),
    "only reasoning": (answer(None, reasoning="so it is 5"), "no_final", "no_final"),
    "only reasoning_content": (answer(None, reasoning_content="hm"), "no_final", "no_final"),
}
#: Refused for good: asking the same server again would not help.
FINAL = {
    "400": (error(400, "no such thing"), "server_error", "http_400"),
    "401": (error(401, "who are you"), "server_error", "http_401"),
    "403": (error(403, "forbidden"), "server_error", "http_403"),
    "404": (error(404, "The model `x` does not exist."), "server_error", "http_404"),
    "307": (reply(b"", 307, {"Location": "http://127.0.0.1:9/v1"}), "server_error", "http_307"),
    "context": (
        error(400, "The prompt is longer than the model's maximum context length."),
        "transport",
        "context_overflow",
    ),
    "context llama.cpp": (
        error(400, "the request exceeds the available context size"),
        "transport",
        "context_overflow",
    ),
}


@pytest.fixture
def server():
    with OpenAiServer(answer(GOOD)) as running:
        yield running


@pytest.mark.parametrize("name", RETRIED)
def test_a_fault_that_may_pass_is_waited_out(server, name):
    act, kind, reason = RETRIED[name]
    server.play(act, act)
    client = make_client(server.url)
    reply = outcome(client)
    assert isinstance(reply, Reply), reply
    assert (reply.content, reply.attempts, len(server.requests)) == (GOOD, 3, 3)
    assert client.stats()[f"attempts_failed/{reason}"] == 2
    assert kind in KINDS


@pytest.mark.parametrize("name", RETRIED)
def test_a_fault_that_stays_is_named(server, name):
    server.otherwise, kind, reason = RETRIED[name]
    client = make_client(server.url, max_attempts=2)
    failure = outcome(client)
    assert isinstance(failure, CallError)
    assert (failure.kind, failure.reason, failure.attempts) == (kind, reason, 2)
    assert client.stats()[f"failed/{reason}"] == 1


@pytest.mark.parametrize("name", FINAL)
def test_a_refusal_of_the_request_is_not_repeated(server, name):
    server.otherwise, kind, reason = FINAL[name]
    failure = outcome(make_client(server.url))
    assert isinstance(failure, CallError)
    assert (failure.kind, failure.reason, len(server.requests)) == (kind, reason, 1)


def test_a_body_over_the_limit_is_not_read_to_its_end(server):
    server.otherwise = server_acts.endless()
    failure = outcome(make_client(server.url, max_attempts=1))
    assert isinstance(failure, CallError) and failure.kind == "too_large"


def test_the_body_of_an_error_is_limited_too(server):
    server.otherwise = server_acts.endless(500)
    failure = outcome(make_client(server.url, max_attempts=1))
    assert isinstance(failure, CallError) and failure.kind == "too_large"


def test_ten_megabytes_are_too_large_and_one_less_than_the_limit_is_not(server):
    server.play(answer("x" * 10_000_000))
    failure = outcome(make_client(server.url, max_attempts=1))
    assert isinstance(failure, CallError) and failure.kind == "too_large"
    body = json.dumps(completion(GOOD)).encode()
    server.play(reply(body + b" " * (MAX_BODY_BYTES - len(body))))
    assert outcome(make_client(server.url, max_attempts=1)).content == GOOD


@pytest.mark.parametrize(
    "act",
    [
        server_acts.silent,
        server_acts.silent_after_headers,
        server_acts.trickle,
        server_acts.trickle_headers,
        server_acts.endless(),
    ],
    ids=["silent", "silent after headers", "trickle", "trickling headers", "endless"],
)
def test_no_server_holds_a_call_past_its_deadline(server, act, monkeypatch):
    monkeypatch.setattr("cosr_jax.curator.wire.MAX_BODY_BYTES", 1 << 60)
    server.otherwise = act
    client = make_client(server.url, deadline_s=0.3, timeout_s=60.0)
    started = time.monotonic()
    failure = outcome(client)
    assert time.monotonic() - started < 50.0
    assert isinstance(failure, CallError)
    assert (failure.kind, failure.reason) == ("transport", "deadline")


def test_a_silent_request_is_given_up_and_repeated(server):
    server.play(server_acts.silent)
    # Where the machine is busy, an answer may come too late as well.
    client = make_client(server.url, timeout_s=0.5, max_attempts=20, breaker_failures=20)
    assert outcome(client).content == GOOD
    assert client.stats()["attempts_failed/timeout"] >= 1


def test_the_deadline_covers_waiting_for_a_free_slot(server):
    server.otherwise = server_acts.silent
    client = make_client(server.url, deadline_s=0.3, timeout_s=60.0, concurrency=2)
    started = time.monotonic()
    outcomes = client.ask_all([Question(REQUEST)] * 6)
    assert time.monotonic() - started < 50.0
    assert {o.reason for o in outcomes} == {"deadline"}
    assert server.at_once <= 4  # two, and those that take their slots as time runs out


def test_a_lookup_of_the_name_that_hangs_does_not_hold_the_call(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(120))
    client = make_client("http://curator.invalid:8000/v1", deadline_s=0.2)
    started = time.monotonic()
    try:
        assert outcome(client).reason == "deadline"
        assert time.monotonic() - started < 60.0
    finally:
        over.set()


def test_nobody_listens():
    with server_acts.refused_url() as url:
        failure = outcome(make_client(url, max_attempts=2))
    assert isinstance(failure, CallError)
    assert (failure.kind, failure.reason, failure.attempts) == ("transport", "connection", 2)


def test_the_wrong_content_type_does_not_matter(server):
    body = json.dumps(completion(GOOD)).encode()
    for content_type in ("text/html", "text/plain; charset=latin-1", "nonsense", ""):
        server.play(reply(body, 200, {"Content-Type": content_type}))
        assert outcome(make_client(server.url, max_attempts=1)).content == GOOD


def test_a_byte_order_mark_does_not_matter(server):
    server.play(reply(b"\xef\xbb\xbf" + json.dumps(completion(GOOD)).encode()))
    assert outcome(make_client(server.url, max_attempts=1)).content == GOOD


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning": "r"}, ("ok", "r", None)),
        ({"reasoning_content": "r"}, ("ok", "r", None)),
        ({"reasoning": "new", "reasoning_content": "old"}, ("ok", "new", None)),
        ({"reasoning": None, "reasoning_content": "r"}, ("ok", "r", None)),
        ({"reasoning": {"text": "r"}}, ("ok", None, None)),
        ({"refusal": "I will not"}, ("ok", None, "I will not")),
        ({"tool_calls": None, "annotations": []}, ("ok", None, None)),
    ],
)
def test_fields_of_the_message(server, fields, expected):
    server.play(answer("ok", **fields))
    reply = outcome(make_client(server.url))
    assert (reply.content, reply.reasoning, reply.refusal) == expected


def test_content_in_parts_is_joined(server):
    server.play(answer([{"type": "text", "text": '{"a"'}, {"type": "text", "text": ": 1}"}]))
    assert outcome(make_client(server.url)).content == '{"a": 1}'


def test_a_refusal_without_content_is_an_answer(server):
    server.play(answer(None, refusal="I cannot help with that"))
    reply = outcome(make_client(server.url))
    assert (reply.refusal, reply.attempts) == ("I cannot help with that", 1)


def test_a_lone_surrogate_neither_stops_the_reply_nor_a_second_question(server):
    body = json.dumps(completion("PLACE")).encode().replace(b"PLACE", rb"a\ud800b")
    server.play(reply(body))
    client = make_client(server.url)
    assert outcome(client, accept=must_be_long).content == GOOD
    assert server.requests[1]["messages"][-2]["content"] == "a\N{REPLACEMENT CHARACTER}b"


def test_the_servers_name_of_the_model_is_kept_or_else_ours(server):
    server.play(answer("x", model="openai/gpt-oss-20b"), answer("x", model=None))
    client = make_client(f"{server.url} model=curator")
    assert outcome(client).model == "openai/gpt-oss-20b"
    assert outcome(client).model == "curator"


def test_the_key_is_sent_and_never_told(server, monkeypatch, caplog):
    monkeypatch.setenv("CURATOR_KEY", "sk-very-secret")
    server.otherwise = error(401, "Incorrect API key provided: sk-very-secret.")
    told = []
    client = make_client(f"{server.url} key=CURATOR_KEY", on_call=told.append)
    with caplog.at_level("DEBUG"):
        failure = outcome(client)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    everything = "\n".join([str(failure), str(told), str(client.state_dict()), caplog.text])
    assert "Incorrect API key" in everything
    assert "secret" not in everything


def test_openais_own_headers_go_to_no_other_host(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    outcome(make_client(server.url))
    assert not re.search("sk-of-openai|secret", str(server.headers[0]))


def test_a_key_does_not_follow_a_redirect(server, monkeypatch):
    monkeypatch.setenv("CURATOR_KEY", "sk-very-secret")
    with OpenAiServer() as other:
        location = {"Location": f"{other.url}/chat/completions"}
        server.otherwise = reply(b"", 308, location)
        assert outcome(make_client(f"{server.url} key=CURATOR_KEY")).reason == "http_308"
        assert other.requests == []


def test_what_is_sent(server):
    outcome(make_client(f"{server.url} model=m"))
    (body,) = server.requests
    schema = {"name": "analyst", "schema": {"type": "object"}, "strict": True}
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Diagnose."},
            {"role": "user", "content": "{}"},
        ],
        "max_tokens": 8192,
        "reasoning_effort": "medium",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    outcome(make_client(f"{server.url} sampling=plain"))
    assert not {"top_k", "min_p"} & server.requests[1].keys()


def test_a_client_with_the_machines_clock_waits(server):
    server.play(error(503, "starting"))
    client = Client(CuratorLlmConfig(endpoints=(f"a {server.url}",)))
    started = time.monotonic()
    assert client.ask(Question(REQUEST)).content == GOOD
    assert 0.5 <= time.monotonic() - started < 60.0


def test_the_wait_that_a_server_asks_for(server):
    clock = SkippingClock()
    server.play(error(429, "slow", {"Retry-After": "17"}), error(503, "x", {"Retry-After": "0"}))
    client = make_client(server.url, clock=clock)
    assert outcome(client).content == GOOD
    assert clock.waits[0] == 17.0
    assert 1.0 <= clock.waits[1] <= 2.0


def test_a_wait_beyond_the_deadline_is_not_begun(server):
    clock = SkippingClock()
    server.play(error(429, "slow", {"Retry-After": "601"}))
    failure = outcome(make_client(server.url, clock=clock))
    assert isinstance(failure, CallError) and failure.reason == "http_429"
    assert clock.waits == [] and len(server.requests) == 1
