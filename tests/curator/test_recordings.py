"""Answers on disk: cached, recorded, replayed without a server, and never half written."""

import dataclasses
import json

import pytest
from client_fixtures import REQUEST, make_client, must_be_long, outcome
from openai_server import OpenAiServer, answer, error, refused_url

from cosr_jax.curator.calls import CallError, Question, Reply
from cosr_jax.curator.recordings import Recordings
from cosr_jax.types import UserError

GOOD = '{"weaknesses": []}'


@pytest.fixture
def server():
    with OpenAiServer(answer(GOOD)) as running:
        yield running


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_cached_answer_costs_nothing(server, tmp_path):
    first = outcome(make_client(server.url, mode="cache", folder=str(tmp_path)))
    client = make_client(server.url, mode="cache", folder=str(tmp_path))
    second = outcome(client)
    assert second == dataclasses.replace(first, from_cache=True)
    assert len(server.requests) == 1
    assert client.budget.spent_in_run.calls == 0
    assert client.stats()["kept"] == 1
    assert "tokens/analyst/prompt" not in client.stats()


@pytest.mark.parametrize(
    "change",
    [
        {"sample": 1},
        {"effort": "high"},
        {"max_tokens": 9},
        {"schema": {"type": "array"}},
        {"schema": None},
        {"messages": REQUEST.messages[:1]},
        {"role": "planner"},
    ],
    ids=str,
)
def test_another_question_has_another_answer(server, tmp_path, change):
    client = make_client(server.url, mode="cache", folder=str(tmp_path))
    outcome(client)
    assert not outcome(client, dataclasses.replace(REQUEST, **change)).from_cache


def test_another_model_or_temperature_has_another_answer(server, tmp_path):
    settings = {"mode": "cache", "folder": str(tmp_path)}
    outcome(make_client(server.url, **settings))
    assert not outcome(make_client(f"{server.url} model=b", **settings)).from_cache
    assert not outcome(make_client(server.url, temperature=0.5, **settings)).from_cache
    assert outcome(make_client(f"{server.url} context=9000", **settings)).from_cache


def test_failures_are_not_cached(server, tmp_path):
    server.play(error(400, "no"))
    client = make_client(server.url, mode="cache", folder=str(tmp_path))
    assert isinstance(outcome(client), CallError)
    assert entries(tmp_path) == []
    assert outcome(client).content == GOOD


def test_an_answer_that_is_accepted_no_more_is_asked_for_again(server, tmp_path):
    settings = {"mode": "cache", "folder": str(tmp_path)}
    server.play(answer("bad"))
    assert outcome(make_client(server.url, **settings)).content == "bad"
    assert outcome(make_client(server.url, **settings), accept=must_be_long).content == GOOD
    assert outcome(make_client(server.url, **settings)).content == GOOD


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "deep", "list", "format"])
def test_a_damaged_entry_is_noticed_and_dropped(server, tmp_path, damage):
    settings = {"mode": "cache", "folder": str(tmp_path)}
    outcome(make_client(server.url, **settings))
    (path,) = entries(tmp_path)
    whole = path.read_text()
    path.write_text(
        {
            "cut": whole[: len(whole) // 2],
            "flip": whole.replace("weaknesses", "weaknesseS"),
            "empty": "",
            "deep": "[" * 100_000,
            "list": "[]",
            "format": whole.replace('"format": 1', '"format": 2'),
        }[damage]
    )
    client = make_client(server.url, **settings)
    assert not outcome(client).from_cache
    assert client.stats()["damaged"] == 1
    assert outcome(make_client(server.url, **settings)).from_cache


def test_an_entry_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    recordings = Recordings(tmp_path)
    recordings.write("ab" * 32, 0, {"reply": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        recordings.write("ab" * 32, 0, {"reply": 2})
    assert recordings.read("ab" * 32, 0) == {"reply": 1}
    assert len(entries(tmp_path)) == 1, "no leftovers"


def test_a_full_disk_stops_a_recording_and_not_a_cache(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    client = make_client(server.url, mode="cache", folder=str(tmp_path))
    assert outcome(client).content == GOOD
    assert client.stats()["unwritten"] == 1
    with pytest.raises(UserError, match="No space"):
        outcome(make_client(server.url, mode="record", folder=str(tmp_path)))


def play_through(client):
    """A small run: rounds of questions, some asked twice."""
    found = []
    for number in (1, 2):
        client.start_round(number)
        samples = (0, 1, 2) if number == 1 else (0, 3)
        questions = [Question(dataclasses.replace(REQUEST, sample=i)) for i in samples]
        found += client.ask_all(questions)
    return found


def told(outcomes):
    return [
        {**o.to_dict(), "from_cache": None} if isinstance(o, Reply) else o.to_dict()
        for o in outcomes
    ]


def test_a_replay_takes_the_same_turns_without_a_server(server, tmp_path):
    """Sample 0 fails in round 1 and is answered in round 2; sample 3 finds the budget spent."""
    settings = {"folder": str(tmp_path), "max_attempts": 1, "concurrency": 1, "calls_per_run": 4}
    server.play(error(500, "once"), answer(None), answer("two", usage=None), answer(GOOD))
    client = make_client(server.url, mode="record", **settings)
    recorded = play_through(client)
    assert [getattr(o, "reason", "") for o in recorded] == [
        "http_500", "empty", "", "", "budget_calls_per_run",
    ]  # fmt: skip

    with refused_url() as url:
        replays = [make_client(url, mode="replay", **settings) for _ in range(2)]
        outcomes = [play_through(replay) for replay in replays]
    assert told(outcomes[0]) == told(outcomes[1]) == told(recorded)
    assert replays[0].state_dict() == replays[1].state_dict()
    assert replays[0].budget.state_dict() == client.budget.state_dict()
    for name in ("tokens/analyst/prompt", "tokens/analyst/completion", "spent/tokens"):
        assert replays[0].stats()[name] == client.stats()[name]


def test_equal_questions_of_a_batch_are_asked_and_paid_for_once(server, tmp_path):
    settings = {"mode": "record", "folder": str(tmp_path)}
    client = make_client(server.url, **settings)
    found = client.ask_all([Question(REQUEST)] * 3) + client.ask_all([Question(REQUEST)] * 2)
    assert {o.content for o in found} == {GOOD} and len(server.requests) == 1
    replay = make_client(server.url, **{**settings, "mode": "replay"})
    replay.ask_all([Question(REQUEST)] * 3)
    assert client.budget.spent_in_run.calls == replay.budget.spent_in_run.calls == 1
    replay.load_state_dict(json.loads(json.dumps(replay.state_dict())))
    replay.ask_all([Question(REQUEST)])
    assert replay.budget.spent_in_run.calls == 1
    make_client(server.url).ask_all([Question(REQUEST)] * 3)
    assert len(server.requests) == 4, "live, each is asked"


def test_a_replay_needs_no_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CURATOR_KEY", "sk-secret-value")
    endpoint = f"{server.url} key=CURATOR_KEY"
    server.play(error(500, "the key sk-secret-value is fine"))
    outcome(make_client(endpoint, mode="record", folder=str(tmp_path)))
    assert "secret" not in "".join(path.read_text() for path in entries(tmp_path))
    monkeypatch.delenv("CURATOR_KEY")
    assert outcome(make_client(endpoint, mode="replay", folder=str(tmp_path))).content == GOOD


def test_a_missing_recording_is_named(server, tmp_path):
    outcome(make_client(server.url, mode="record", folder=str(tmp_path)))
    client = make_client(server.url, mode="replay", folder=str(tmp_path))
    with pytest.raises(UserError, match="no recording of this question of the planner"):
        outcome(client, dataclasses.replace(REQUEST, role="planner"))


def test_a_damaged_recording_is_named_and_kept(server, tmp_path):
    outcome(make_client(server.url, mode="record", folder=str(tmp_path)))
    (path,) = entries(tmp_path)
    path.write_text(path.read_text().replace("weaknesses", "weaknesseS"))
    with pytest.raises(UserError, match=r"damaged .*checksum"):
        outcome(make_client(server.url, mode="replay", folder=str(tmp_path)))
    assert path.exists()


def test_a_recorded_run_that_is_resumed_goes_on_as_if_never_broken(server, tmp_path):
    settings = {"mode": "record", "max_attempts": 1, "concurrency": 1}
    acts = [error(500, "once"), answer("one"), answer("two"), answer(GOOD), answer("three")]
    server.play(*acts)
    whole = make_client(server.url, folder=str(tmp_path / "a"), **settings)
    expected = play_through(whole)

    server.play(*acts)
    broken = make_client(server.url, folder=str(tmp_path / "b"), **settings)
    start = json.loads(json.dumps(broken.state_dict()))
    play_through(broken)
    resumed = make_client(server.url, folder=str(tmp_path / "b"), **settings)
    resumed.load_state_dict(start)
    sent = len(server.requests)
    assert [getattr(o, "content", None) for o in play_through(resumed)] == [
        getattr(o, "content", None) for o in expected
    ]
    assert len(server.requests) == sent, "nothing is asked, or paid for, a second time"
    assert resumed.budget.state_dict() == whole.budget.state_dict()


def test_a_recording_rejected_by_new_rules_fails_as_its_kind(server, tmp_path):
    server.play(answer("bad"))
    outcome(make_client(server.url, mode="record", folder=str(tmp_path)))
    client = make_client(server.url, mode="replay", folder=str(tmp_path))
    failure = outcome(client, accept=must_be_long)
    assert (failure.kind, failure.reason) == ("schema", "rejected")


def test_a_recording_can_be_read_by_people(server, tmp_path):
    outcome(make_client(server.url, mode="record", folder=str(tmp_path)))
    (path,) = entries(tmp_path)
    payload = json.loads(path.read_text())["payload"]
    assert payload["request"]["messages"][0]["content"] == "Diagnose."
    assert payload["reply"]["content"] == GOOD
    assert path.name.endswith("-0.json") and path.parent.name == path.name[:2]
