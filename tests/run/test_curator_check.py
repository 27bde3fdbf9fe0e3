"""``cosr doctor --curator`` finds what a server lacks, and says in one line what to do about it."""

import json
import re

import openai_server as acts
import pytest
from openai_server import OpenAiServer, refused_url

from cosr_jax.main import main
from cosr_jax.run import curator_check

CLAIM = {
    "skill": "addition",
    "kind": "arithmetic",
    "evidence_task_ids": ["t1", "t2"],
    "severity": 0.7,
    "rationale": "The carry is lost.",
}
ANSWER = json.dumps({"weaknesses": [CLAIM]})


@pytest.fixture
def server():
    with OpenAiServer(acts.answer(ANSWER)) as running:
        yield running


def examine(capsys, text, code=0):
    """The findings by check: (mark, words)."""
    assert main(["doctor", f"--curator={text}"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    found = [re.fullmatch(r"(ok  |FAIL) (\w+) +(.*)", line) for line in captured.out.splitlines()]
    return {match[2]: (match[1].strip(), match[3]) for match in found}


def test_a_good_server_passes_and_its_costs_are_told(server, capsys):
    usage = {
        "prompt_tokens": 2000,
        "completion_tokens": 300,
        "completion_tokens_details": {"reasoning_tokens": 250},
    }
    server.otherwise = acts.answer(ANSWER, usage=usage, reasoning="The carry, it seems.")
    found = examine(capsys, f"teacher {server.url} model=served input=0.5 output=2")
    assert [mark for mark, _ in found.values()] == ["ok"] * 5
    assert list(found) == ["server", "model", "schema", "analyst", "reasoning"]
    assert server.url in found["server"][1]
    assert found["model"][1] == "served; 65536 tokens of context"
    costs = "2000 tokens in, 300 out (250 of reasoning), $0.001600"
    assert costs in found["schema"][1] and costs in found["analyst"][1]
    assert found["analyst"][1].startswith("1 weaknesses claimed of three planted slips; ")
    assert found["reasoning"][1] == "in a field of its own, 20 characters"
    schema, analyst = server.requests
    assert "weaknesses" not in json.dumps(schema["messages"])
    assert schema["response_format"]["json_schema"]["schema"]["required"] == ["weaknesses"]
    assert "# Response Formats" in analyst["messages"][0]["content"]


def test_an_address_alone_is_enough(server, capsys):
    server.models = acts.reply_json({"data": [{"id": "first"}, {"id": "second"}]})
    found = examine(capsys, server.url)
    assert found["model"] == (
        "ok",
        "first, one of first, second; it does not tell its context, so runs count on 65536 tokens",
    )
    assert {body["model"] for body in server.requests} == {"first"}
    assert found["analyst"][1].endswith("no price given (input=, output=)")
    assert found["reasoning"][1].startswith("none, which is right")


def test_nobody_listens(capsys):
    with refused_url() as url:
        found = examine(capsys, url, code=1)
    assert list(found) == ["server"]
    assert found["server"][0] == "FAIL" and found["server"][1].startswith(url)
    assert "launch/curator_server.sh" in found["server"][1]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            acts.error(401, "bad key"),
            r"HTTP 401: .*bad key.*; name the environment .* add key=NAME",
        ),
        (acts.reply(b"<html>", headers={"Content-Type": "text/html"}), "; give the address of an"),
        (acts.error(404, "nothing here"), "mostly in /v1"),
        (acts.error(503, "loading"), "look into the server's log"),
        (acts.reply_json({"object": "list"}), "no list of models; give the address"),
        (acts.reset, "check host and port"),
    ],
)
def test_no_list_of_models(act, words, server, capsys):
    server.models = act
    found = examine(capsys, server.url, code=1)
    assert list(found) == ["server"] and re.search(words, found["server"][1])
    assert server.requests == []


def test_a_server_that_does_not_answer(server, capsys, monkeypatch):
    monkeypatch.setattr(curator_check, "_CALL_S", 0.1)
    server.otherwise = acts.silent
    found = examine(capsys, server.url, code=1)
    assert re.search("no answer in 0.1 s|0.1 s are over", found["schema"][1])
    assert found["analyst"][1].startswith("not asked, as the call before got no answer")
    assert len(server.requests) <= 1
    monkeypatch.setattr(curator_check, "_LIST_S", 0.1)
    server.models = acts.silent
    assert "no list of models in 0.1 s" in examine(capsys, server.url, code=1)["server"][1]


def test_a_server_without_a_list_is_trusted_about_the_model(server, capsys):
    server.models = acts.error(404, "no such path")
    found = examine(capsys, f"{server.url} model=mine")
    assert found["model"][1].startswith("mine; the server lists none")
    assert {body["model"] for body in server.requests} == {"mine"}


def test_models(server, capsys):
    found = examine(capsys, f"{server.url} model=other", code=1)
    assert list(found) == ["server", "model"]
    assert "has no model 'other'; write model=served; it serves served" in found["model"][1]
    server.models = acts.reply_json({"data": []})
    assert "serves no model" in examine(capsys, server.url, code=1)["model"][1]
    server.models = acts.reply_json({"data": [{"id": "served", "max_model_len": 8192}]})
    found = examine(capsys, server.url)
    assert found["model"][1].endswith("8192 tokens of context: add context=8192 to the endpoint")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (acts.answer("It is windy."), "no JSON ('It is windy.')"),
        (acts.answer(f"```json\n{ANSWER}\n```"), "the answer is no JSON"),
        (acts.answer('{"weather": "windy"}'), "the answer's JSON is another"),
        (acts.answer(ANSWER.replace("t1", "t9").replace("t2", "t8")), "JSON is another"),
        (acts.answer("", finish_reason="length"), "choose another model"),
        (acts.answer(None, reasoning="Hm."), "have the server separate reasoning"),
        (acts.error(500, "grammar\nbackend"), "HTTP 500: .*grammar backend; look into the server"),
    ],
)
def test_schemas_that_are_not_kept(act, words, server, capsys):
    server.play(act)
    found = examine(capsys, server.url, code=1)
    assert [name for name, (mark, _) in found.items() if mark == "FAIL"] == ["schema"]
    assert words in found["schema"][1] or re.search(words, found["schema"][1])


def test_a_server_that_refuses_schemas(server, capsys):
    server.play(acts.error(400, "response_format is not supported"))
    found = examine(capsys, server.url, code=1)
    assert found["schema"][1].startswith("the server refuses JSON schemas; use a server with")
    assert found["analyst"][0] == "ok" and "response_format" not in server.requests[1]


def test_parameters_that_are_refused_are_told(server, capsys):
    server.play(acts.answer(ANSWER), acts.error(400, "unknown field min_p"))
    assert examine(capsys, server.url)["analyst"][1].endswith("; the server refuses min_p")


def test_an_analyst_that_cannot_be_used(server, capsys):
    server.play(acts.answer(ANSWER), acts.answer('{"weaknesses": "none"}'))
    found = examine(capsys, server.url, code=1)
    assert "schema: " in found["analyst"][1]
    assert found["analyst"][1].endswith(
        "choose a stronger model, or a server that enforces schemas"
    )


@pytest.mark.parametrize("leak", ["<think>Hm.</think>", "<|channel|>final<|message|>"])
def test_reasoning_in_the_answer(leak, server, capsys):
    server.otherwise = acts.answer(leak + ANSWER)
    found = examine(capsys, server.url, code=1)
    assert found["reasoning"][1].startswith("reasoning is mixed into the answer")
    assert "reasoning parser" in found["reasoning"][1]


def test_keys_come_from_the_environment_and_are_not_told(server, capsys, monkeypatch):
    text = f"{server.url} key=TEACHER_KEY"
    assert main(["doctor", f"--curator={text}"]) == 2
    assert "TEACHER_KEY, which is not set" in capsys.readouterr().err
    monkeypatch.setenv("TEACHER_KEY", "sesame-open")
    examine(capsys, text)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame-open"}
    server.models = acts.error(401, "no sesame-open")
    found = examine(capsys, text, code=1)
    assert found["server"][1].endswith("check the key in the environment variable TEACHER_KEY")
    assert "sesame" not in found["server"][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--curator=localhost:8000"], "not 'NAME URL option=value ...'"),
        (["--curator=http://127.0.0.1:1/v1 price=3"], "'price=3' is not an option=value"),
        (["--curator=http://127.0.0.1:1/v1", "--workdir=x"], "check one at a time"),
    ],
)
def test_wrong_calls_are_one_line(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1
