"""The pool over HTTP: tokens, idempotent ids, back-pressure, and servers that die."""

import asyncio
import contextlib
import dataclasses
import json
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.pool import VerifierPool

pytest.importorskip("aiohttp")

import aiohttp
from aiohttp import web

from cosr_jax.verifiers import remote, service
from cosr_jax.verifiers.front import LocalFront

TOKEN = "a-token"


class GatedJudge:
    """Passes "4"; a completion "wait ..." waits for the gate, "error" cannot be judged."""

    def __init__(self):
        self.calls = []
        self.gate = asyncio.Event()

    async def start(self):
        pass

    async def close(self):
        pass

    async def judge(self, task, completion, limits):
        self.calls.append(completion.text)
        if completion.text.startswith("wait"):
            await self.gate.wait()
        if completion.text == "error":
            return Verdict(Outcome.ERROR, 0.0, detail="no luck")
        if completion.text == "lacking":
            raise UserError("no browser", "install one")
        if completion.text == "4":
            return Verdict(Outcome.PASS, 1.0, answer="4", method="bare", value_correct=True)
        return Verdict(Outcome.FAIL, 0.0, "wrong_answer", detail="not 4")


@contextlib.asynccontextmanager
async def served(**config):
    """A client session and the judge behind it."""
    judge = GatedJudge()
    settings = VerifierConfig(**config)
    front = LocalFront(settings, {"math": lambda config, workers: judge})
    runner = web.AppRunner(service.Service(front, settings, TOKEN).app(), shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}/", headers=headers) as session:
            yield session, judge
    finally:
        judge.gate.set()
        await runner.cleanup()
        await front.close()


def body(case_id, completion="4", **fields):
    return {"id": case_id, "type": "math", "completion": completion, "gold": "4", **fields}


async def post(session, case):
    data = case if isinstance(case, bytes) else json.dumps(case)
    async with session.post("v1/judge", data=data) as response:
        return response.status, await response.json()


async def metrics(session):
    async with session.get("metrics") as response:
        return await response.text()


def test_a_case_is_answered_as_on_stdio():
    async def run():
        async with served() as (session, _):
            return await post(session, body("x")), await post(session, body("y", "5"))

    (status, right), (_, wrong) = asyncio.run(run())
    assert status == 200
    assert set(right) == {"id", "verdict", "score", "category", "wall_s"}
    assert (right["id"], right["verdict"], right["score"]) == ("x", "pass", 1.0)
    assert (wrong["verdict"], wrong["category"]) == ("fail", "wrong_answer")


def test_the_same_id_and_body_are_judged_once():
    async def run():
        async with served() as (session, judge):
            first = [await post(session, body("x")) for _ in range(3)]
            waiting = [asyncio.ensure_future(post(session, body("y", "wait"))) for _ in range(5)]
            while len(judge.calls) < 2:
                await asyncio.sleep(0.01)
            judge.gate.set()
            return first, [await answer for answer in waiting], judge.calls

    first, second, calls = asyncio.run(run())
    assert first == first[:1] * 3
    assert second == second[:1] * 5
    assert calls == ["4", "wait"]


def test_the_same_id_with_another_body_is_refused():
    async def run():
        async with served() as (session, judge):
            await post(session, body("x"))
            return await post(session, body("x", "5")), judge.calls

    (status, answer), calls = asyncio.run(run())
    assert status == 409
    assert "another body" in answer["error"]
    assert calls == ["4"]


def test_a_client_who_hangs_up_finds_the_answer_later():
    async def run():
        async with served() as (session, judge):
            hasty = asyncio.ensure_future(post(session, body("x", "wait")))
            while not judge.calls:
                await asyncio.sleep(0.01)
            hasty.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hasty
            judge.gate.set()
            return await post(session, body("x", "wait")), judge.calls

    (status, answer), calls = asyncio.run(run())
    assert (status, answer["verdict"]) == (200, "fail")
    assert calls == ["wait"]


def test_errors_are_not_remembered():
    async def run():
        async with served() as (session, judge):
            answers = [await post(session, body("x", "error")) for _ in range(2)]
            return answers, judge.calls

    answers, calls = asyncio.run(run())
    assert [(status, a["verdict"], a["score"]) for status, a in answers] == [
        (200, "error", None)
    ] * 2
    assert len(calls) == 4  # each of them twice


def test_a_full_queue_says_when_to_come_back():
    async def run():
        async with served(workers=1, queue=2) as (session, judge):
            waiting = [
                asyncio.ensure_future(post(session, body(f"w{n}", f"wait {n}"))) for n in range(2)
            ]
            while "cosr_verifier_queue_length 2\n" not in await metrics(session):
                await asyncio.sleep(0.01)
            async with session.post("v1/judge", json=body("late")) as response:
                refused = response.status, response.headers["Retry-After"]
            judge.gate.set()
            await asyncio.gather(*waiting)
            return refused, await post(session, body("late"))

    refused, (status, answer) = asyncio.run(run())
    assert refused == (429, "1")
    assert (status, answer["verdict"]) == (200, "pass")


@pytest.mark.parametrize(
    "case",
    [b"nonsense", b"[]", body("x", limits=5), body(7), body(""), {**body("x"), "type": "poem"}],
)
def test_what_is_no_case_is_refused(case):
    async def run():
        async with served() as (session, _):
            return await post(session, case)

    status, answer = asyncio.run(run())
    assert status == 400
    assert answer["error"]


def test_a_domain_that_this_host_lacks():
    async def run():
        async with served() as (session, _):
            return await post(session, body("x", "lacking"))

    status, answer = asyncio.run(run())
    assert (status, answer["error"]) == (501, "no browser; install one")


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}]
)
def test_all_but_health_needs_the_token(headers):
    async def run():
        async with served() as (session, judge):
            url = str(session._base_url)
            found = {}
            async with aiohttp.ClientSession(url, headers=headers) as stranger:
                for path in ("v1/rules", "metrics", "health", "nowhere"):
                    async with stranger.get(path) as response:
                        found[path] = response.status
                found["judge"], _ = await post(stranger, body("x"))
            return found, judge.calls

    found, calls = asyncio.run(run())
    assert found == {"v1/rules": 401, "metrics": 401, "health": 200, "nowhere": 401, "judge": 401}
    assert calls == []


def test_metrics_are_counted_by_domain():
    async def run():
        async with served() as (session, _):
            for n in range(3):
                await post(session, body(f"{n}", "4" if n else "5"))
            async with session.get("metrics") as response:
                return await response.text()

    lines = asyncio.run(run()).splitlines()
    assert 'cosr_verifier_verdicts_total{domain="math",category="pass"} 2' in lines
    assert 'cosr_verifier_verdicts_total{domain="math",category="wrong_answer"} 1' in lines
    assert "cosr_verifier_queue_length 0" in lines


def test_forgotten_ids_are_judged_again(monkeypatch):
    monkeypatch.setattr(service, "_REMEMBERED", 2)

    async def run():
        async with served() as (session, judge):
            for case_id in ("a", "b", "c", "a", "c"):
                await post(session, body(case_id))
            return judge.calls

    assert len(asyncio.run(run())) == 4


# --- the client, and a server in a process of its own -------------------------------------------


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return path


@contextlib.contextmanager
def server(token_file, *arguments, port=0):
    """The URL of a real server, and its process."""
    command = [sys.executable, "-m", "cosr_jax.main", "verifier-serve", f"--port={port}"]
    with subprocess.Popen(
        [*command, f"--token_file={token_file}", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()


def math(answer, gold=r"\sqrt{8}"):
    task = Task("math", "s", 0.0, "?", gold, f"key:{gold}")
    return task, Completion((), (), rf"\boxed{{{answer}}}", "stop")


def settings(url, token_file, **fields):
    return VerifierConfig(url=url, token_file=str(token_file), wall_s=60.0, **fields)


def test_a_remote_pool_judges_like_a_local_one(token_file):
    cases = [math(r"2\sqrt{2}"), math("3"), math("4", "4"), (math("4", "4")[0], math("x")[1])]
    cases.append((cases[2][0], Completion((), (), "The answer is 4", "length")))
    config = VerifierConfig(wall_s=60.0)
    with VerifierPool(config) as local:
        expected = local.judge(cases * 5)
    with server(token_file, "--config.verifier.accept=('boxed',)") as (url, process):
        with VerifierPool(settings(url, token_file)) as pool:
            found = pool.judge(cases * 5)
            stats = pool.stats()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=240) == 0
    untimed = [[dataclasses.replace(v, seconds=0.0) for v in each] for each in (expected, found)]
    assert untimed[0] == untimed[1]
    assert stats["by_domain"]["math"]["pass"] == 10
    assert (stats["errors"], stats["retries"]) == (0, 0)


def test_a_server_with_other_rules_is_refused(token_file):
    with (
        server(token_file) as (url, _),
        pytest.raises(UserError, match=r"other rules .*'accept': \['boxed'\]"),
    ):
        VerifierPool(settings(url, token_file))


def test_a_wrong_token_is_refused(token_file, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    with server(token_file) as (url, _), pytest.raises(UserError, match="401"):
        VerifierPool(settings(url, wrong))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("", "no token"), ("a b\x00", "no token")]
)
def test_a_token_has_to_be_there(tmp_path, content, message):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        VerifierPool(settings("http://127.0.0.1:1", path))


def test_a_server_that_does_not_answer_is_named(token_file):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port} does not answer"):
        VerifierPool(settings(f"http://127.0.0.1:{port}", token_file))


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "127.0.0.1:8600"])
def test_a_url_that_is_none_is_named(token_file, url):
    with pytest.raises(UserError, match=r"config\.verifier\.url"):
        VerifierPool(settings(url, token_file))


def test_a_server_that_dies_leaves_cases_unjudged(token_file, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    with (
        server(token_file, "--config.verifier.accept=('boxed',)") as (url, process),
        VerifierPool(settings(url, token_file)) as pool,
    ):
        (verdict,) = pool.judge([math("4", "4")])
        assert verdict.outcome is Outcome.PASS
        process.kill()
        process.wait()
        verdicts = pool.judge([math("4", "4")] * 10)
        assert [v.outcome for v in verdicts] == [Outcome.ERROR] * 10
        assert url in verdicts[0].detail
        assert pool.stats()["errors"] == 10


def test_a_server_that_comes_back_goes_unnoticed(token_file, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(remote, "_ATTEMPTS", 7)  # three minutes, however slowly a server starts
    accept = "--config.verifier.accept=('boxed',)"
    with (
        server(token_file, accept) as (url, process),
        VerifierPool(settings(url, token_file)) as pool,
    ):
        process.kill()
        process.wait()

        async def run():
            answer = asyncio.ensure_future(pool.judge_async([math("4", "4")]))
            while not pool.stats()["retries"]:
                await asyncio.sleep(0.01)
            with server(token_file, accept, port=int(url.rpartition(":")[2])):
                return await answer

        (verdict,) = asyncio.run(run())
        assert verdict.outcome is Outcome.PASS
        assert pool.stats()["retries"] >= 1


def test_a_full_server_makes_the_client_wait(token_file):
    arguments = ("--config.verifier.accept=('boxed',)", "--config.verifier.queue=1")
    with (
        server(token_file, *arguments) as (url, _),
        VerifierPool(settings(url, token_file)) as pool,
    ):
        verdicts = pool.judge([math(r"2\sqrt{2}")] * 6)
    assert [v.outcome for v in verdicts] == [Outcome.PASS] * 6


def test_serving_needs_a_token_and_a_free_port(token_file):
    def run(*arguments):
        command = [sys.executable, "-m", "cosr_jax.main", "verifier-serve", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "--token_file is missing; write one" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(f"--token_file={token_file}", f"--port={taken.getsockname()[1]}")
    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1" in done.stderr


def test_it_listens_on_loopback_alone(token_file):
    with server(token_file) as (url, _):
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/health", timeout=120) as response:
            assert json.load(response) == {"status": "ok"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/metrics", timeout=120)
        port = int(url.rpartition(":")[2])
        with socket.socket() as other:
            other.settimeout(120)
            assert other.connect_ex(("127.0.0.2", port)) != 0
