"""Questions asked while something else runs: the same answers, once, whatever happens meanwhile."""

import dataclasses
import json
import threading

import pytest
from client_fixtures import REQUEST, make_client
from openai_server import OpenAiServer, answer, error
from scripted_students import Student, Teacher, diagnose, make_curator, make_lab

from cosr_jax.curator.calls import CallError, Question, Reply
from cosr_jax.types import UserError

GOOD = '{"weaknesses": []}'
#: Bounds a failure; nothing that passes waits as long.
PATIENCE_S = 300


@pytest.fixture
def server():
    with OpenAiServer(answer(GOOD)) as running:
        yield running


def numbered(count):
    return [Question(dataclasses.replace(REQUEST, sample=i)) for i in range(count)]


# --- the client


def test_the_server_answers_while_the_block_runs_and_is_asked_once(server):
    asked, is_busy = threading.Event(), threading.Event()

    def act(exchange):
        asked.set()
        assert is_busy.wait(PATIENCE_S)  # no answer before the block says so
        answer(GOOD)(exchange)

    server.otherwise = act
    records = []
    client = make_client(server.url, on_call=records.append)
    with client.asking(numbered(1)):
        assert asked.wait(PATIENCE_S)  # nor does the block go on before the server is asked
        is_busy.set()
    (reply,) = client.ask_all(numbered(1))
    assert (reply.content, len(server.requests), len(records)) == (GOOD, 1, 1)
    assert client.stats()["calls/analyst"] == client.budget.spent_in_run.calls == 1
    assert client.busy_s > 0
    client.ask_all(numbered(1))
    assert len(server.requests) == 2  # what is asked again is asked


def test_the_end_of_the_block_waits_for_answers(server):
    is_over = threading.Event()

    def act(exchange):
        assert is_over.wait(PATIENCE_S)
        answer(GOOD)(exchange)

    server.otherwise = act
    client = make_client(server.url)
    with client.asking(numbered(2)):
        is_over.set()
    server.otherwise = error(500, "broken")
    assert [reply.content for reply in client.ask_all(numbered(2))] == [GOOD, GOOD]
    assert client.waited_s > 0


def test_answers_and_failures_survive_a_checkpoint(server):
    server.play(answer(GOOD))
    server.otherwise = error(400, "no")
    client = make_client(server.url, concurrency=1, max_attempts=1)
    with client.asking(numbered(2)):
        pass
    other = make_client(server.url)
    other.load_state_dict(json.loads(json.dumps(client.state_dict())))
    found = other.ask_all(numbered(2))
    assert [type(outcome) for outcome in found] == [Reply, CallError]
    for mine, theirs in zip(found, client.ask_all(numbered(2)), strict=True):
        assert mine.to_dict() == theirs.to_dict()
    assert len(server.requests) == 2
    assert other.state_dict() == client.state_dict()


def test_another_question_is_asked_itself(server):
    client = make_client(server.url)
    with client.asking(numbered(1)):
        pass
    client.ask_all(numbered(2)[1:])
    assert len(server.requests) == 2
    client.ask_all(numbered(1))
    assert len(server.requests) == 3  # the answer that nobody asked for is gone


def test_what_a_replay_lacks_is_told_when_it_is_asked_for(server, tmp_path):
    client, resumed = (
        make_client(server.url, mode="replay", folder=str(tmp_path)) for _ in range(2)
    )
    with client.asking(numbered(2)):
        pass
    resumed.load_state_dict(client.state_dict())
    for replaying in (client, resumed):
        with pytest.raises(UserError, match="no recording of this question of the analyst"):
            replaying.ask_all(numbered(2))


def test_a_block_that_fails_waits_for_nobody(server):
    asked, release = threading.Event(), threading.Event()

    def act(exchange):
        asked.set()
        release.wait(PATIENCE_S)

    server.otherwise = act
    client = make_client(server.url, tokens_per_run=20_000)
    try:
        with pytest.raises(KeyboardInterrupt), client.asking(numbered(1)):
            assert asked.wait(PATIENCE_S)
            raise KeyboardInterrupt
        assert not release.is_set()
    finally:
        release.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "asking"]
    server.otherwise = answer(GOOD)
    (reply,) = client.ask_all(numbered(1))  # what was set aside for it is free again
    assert reply.content == GOOD


# --- the curator


def play(server, ahead, is_resumed=False):
    """Two rounds, of which the second is planned after as much as ``ahead`` says was asked."""
    student = Student({("addition", "logic"): 0.5})
    curator = make_curator(server.url)
    first, second = (diagnose(student, number, seed=number) for number in (1, 2))
    plans = [curator.plan(first, make_lab(student, 1))]
    sent = len(server.requests)
    if ahead:
        with curator.asking_ahead(2, list(second.evidence), list(second.failures)):
            pass
    assert len(server.requests) - sent == ahead
    curator.observe_gain(plans[0], 0.02)
    if is_resumed:
        state = json.loads(json.dumps(curator.state_dict()))
        curator = make_curator(server.url)
        curator.load_state_dict(state)
    plans.append(curator.plan(second, make_lab(student, 2)))
    return plans, without_clocks(curator.state_dict())


def without_clocks(state):
    counts = state["client"]["counts"]
    state["client"]["counts"] = {k: v for k, v in counts.items() if "latency" not in k}
    return state


def test_when_it_is_asked_is_all_that_changes():
    runs = []
    with OpenAiServer(Teacher()) as server:
        for ahead, is_resumed in ((False, False), (True, False), (True, True)):
            server.requests.clear()
            runs.append((*play(server, ahead, is_resumed), list(server.requests)))
    assert runs[0] == runs[1] == runs[2]


def test_asking_ahead_is_asking_unless_answers_are_yet_to_come():
    student = Student({("addition", "logic"): 0.5})
    diagnosis = diagnose(student, 1, seed=1)
    with OpenAiServer(Teacher()) as server:
        curator = make_curator(server.url)
        assert curator.wanted_diagnosis()  # nothing is known yet
        with curator.asking_ahead(1, diagnosis.evidence, diagnosis.failures):
            pass
        assert not server.requests
        curator.plan(diagnosis, make_lab(student, 1))
        sent = len(server.requests)
        assert not curator.wanted_diagnosis()
        with curator.asking_ahead(2, diagnosis.evidence, ()):
            pass
        assert len(server.requests) == sent  # without failures there is nothing to explain
        curator.take_seconds()
        with curator.asking_ahead(2, diagnosis.evidence, diagnosis.failures):
            pass
        assert len(server.requests) == sent + 1
        busy_s, waited_s = curator.take_seconds()
        assert busy_s > 0 and waited_s > 0 and curator.take_seconds() == (0.0, 0.0)
    assert make_curator().take_seconds() == (0.0, 0.0)
