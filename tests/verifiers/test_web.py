import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from corpus import web_pages

from cosr_jax.types import Completion, Outcome, Task, UserError, Verdict, WebChecks
from cosr_jax.verifiers import browser as browser_module
from cosr_jax.verifiers import contrast, web
from cosr_jax.verifiers.browser import Browser, CommandRefused, find_browser
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.web import WebJudge, extract_document, read_requirements
from cosr_jax.verifiers.web_checklist import Checklist, Material, Opinion, Unanswered, lowered


def chromium():
    try:
        return find_browser()
    except UserError:
        return ""


needs_chromium = pytest.mark.skipif(not chromium(), reason="Chromium is not installed")
PATIENT = Limits(wall_s=120.0)


def web_task(requirements=web_pages.TEXT):
    text = requirements if isinstance(requirements, str) else json.dumps(requirements)
    return Task("web", "web_test", 0.5, "Make a page.", "", "k", checks=WebChecks(text))


def fenced(page):
    return f"Here is the page.\n```html\n{page}\n```\nIt works."


def judge_pages(pages, requirements=web_pages.TEXT, limits=PATIENT, tokens=(), **options):
    async def run():
        judge = WebJudge(**options)
        await judge.start()
        try:
            return await asyncio.gather(
                *(
                    judge.judge(
                        web_task(requirements), Completion(tokens, (), fenced(page), "stop"), limits
                    )
                    for page in pages
                )
            )
        finally:
            await judge.close()

    return asyncio.run(run())


#: What is judged in every run of the suite; the others take a minute and are slow.
QUICK_HONEST = ("plain", "roles")
QUICK_CHEATS = (
    *("empty", "nothing happens", "many statuses", "console error", "white on white", "covered"),
    *("wide and cut off", "patched tools"),
)


def quick_or_slow(names, quick):
    assert set(quick) <= set(names)
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def judged(request):
    """{page: verdict} of the pages that this run asks for, two browsers sharing them."""
    names = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and "name" in item.fixturenames
    }
    names |= {"empty", "nothing happens"}
    corpus = {**web_pages.HONEST, **{n: page for n, (page, *_) in web_pages.CHEATS.items()}}
    pages = [page for name, page in corpus.items() if name in names]
    return dict(zip(pages, judge_pages(pages), strict=True))


@needs_chromium
@pytest.mark.parametrize("name", quick_or_slow(web_pages.HONEST, QUICK_HONEST))
def test_honest_pages_pass(judged, name):
    verdict = judged[web_pages.HONEST[name]]
    assert (verdict.outcome, verdict.reward, verdict.detail) == (Outcome.PASS, 1.0, "")
    assert verdict.value_correct


@needs_chromium
@pytest.mark.parametrize("name", quick_or_slow(web_pages.CHEATS, QUICK_CHEATS))
def test_wrong_and_cheating_pages_fail_for_the_reason(judged, name):
    page, category, word = web_pages.CHEATS[name]
    verdict = judged[page]
    assert verdict.outcome is Outcome.FAIL, verdict.detail
    assert verdict.reward < 1.0
    assert verdict.category == category or not category
    assert word in verdict.detail


@needs_chromium
def test_an_empty_page_earns_nothing_and_a_broken_function_a_part(judged):
    assert judged[web_pages.CHEATS["empty"][0]].reward == 0.0
    assert 0.5 < judged[web_pages.CHEATS["nothing happens"][0]].reward < 1.0


STUCK = "<html><script>for (;;);</script></html>"


@needs_chromium
@pytest.mark.parametrize(
    ("spent", "outcome", "category"),
    [(9.0, Outcome.FAIL, "timeout"), (0.1, Outcome.ERROR, "")],
    ids=["computing", "starved"],
)
def test_a_page_without_end_is_to_blame_only_if_it_computed(monkeypatch, spent, outcome, category):
    readings = itertools.chain((0.0,), itertools.repeat(spent))
    monkeypatch.setattr(Browser, "cpu_seconds", lambda self: next(readings))
    (verdict,) = judge_pages([STUCK], limits=Limits(wall_s=1.0))
    assert (verdict.outcome, verdict.category) == (outcome, category), verdict
    assert verdict.detail.startswith(f"no end within {1 if category else 3} s")


@needs_chromium
def test_a_starved_page_gets_more_time(monkeypatch):
    monkeypatch.setattr(Browser, "cpu_seconds", lambda self: 0.0)
    monkeypatch.setattr(web, "_STRETCH", 120)
    check_page = web.check_page

    async def slowly(page, wanted):
        await asyncio.sleep(1.5)
        return await check_page(page, wanted)

    monkeypatch.setattr(web, "check_page", slowly)
    (verdict,) = judge_pages(["<p>Hello.</p>"], {"expect": [{"contains": "Hello"}]}, Limits(1.0))
    assert verdict.outcome is Outcome.PASS


@needs_chromium
def test_a_browser_that_shows_nothing_is_no_fault_of_the_page(monkeypatch):
    async def refused(page, document, width):
        raise CommandRefused("no")

    monkeypatch.setattr(web.Page, "open", refused)
    (verdict,) = judge_pages(["<p>Hello.</p>"])
    assert (verdict.outcome, verdict.detail[:13]) == (Outcome.ERROR, "a new browser")


@needs_chromium
def test_chance_is_the_same_in_every_browser():
    page = "<p id=a></p><script>a.textContent = 'drew ' + Math.random()</script>"
    wanted = {"expect": [{"contains": "nothing like it"}]}
    first, second = (judge_pages([page], wanted)[0].detail for _ in range(2))
    assert "drew 0." in first
    assert first == second


@pytest.mark.slow  # a crowded machine gives the page too little time to be blamed
@needs_chromium
def test_a_page_that_computes_for_ever_leaves_the_next_one_alone():
    stuck, honest = judge_pages([STUCK, web_pages.HONEST_PAGE], limits=Limits(8.0), max_pages=1)
    assert (stuck.outcome, stuck.category) == (Outcome.FAIL, "timeout"), stuck
    assert honest.outcome is Outcome.PASS, honest


@pytest.mark.slow
@needs_chromium
def test_a_page_that_eats_memory_crashes_alone():
    hungry = "<html><script>const a = []; for (;;) a.push(new Array(1e6).fill({}))</script></html>"
    verdicts = judge_pages([hungry, web_pages.HONEST_PAGE], max_pages=1)
    assert (verdicts[0].outcome, verdicts[0].category) == (Outcome.FAIL, "crash"), verdicts[0]
    assert verdicts[1].outcome is Outcome.PASS


class Listener:
    """Counts connections and datagrams to a loopback port."""

    def __enter__(self):
        self.hits = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.threads = [
            threading.Thread(target=self.count, args=(s,)) for s in (self.tcp, self.udp)
        ]
        for thread in self.threads:
            thread.start()
        return self

    def count(self, sock):
        sock.settimeout(0.1)
        while sock.fileno() >= 0:
            with contextlib.suppress(TimeoutError, OSError):
                if sock is self.tcp:
                    sock.accept()[0].close()
                else:
                    sock.recv(100)
                self.hits += 1

    def __exit__(self, *exc_info):
        self.tcp.close()
        self.udp.close()
        for thread in self.threads:
            thread.join()


@needs_chromium
@pytest.mark.parametrize("use_namespace", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_page_reaches_even_loopback(use_namespace):
    with Listener() as listener:
        with contextlib.closing(socket.create_connection(("127.0.0.1", listener.port))):
            while not listener.hits:  # it does count
                time.sleep(0.01)
        page = (Path(__file__).parent / "corpus" / "web_network.html").read_text()
        page = page.replace("HOST", f"127.0.0.1:{listener.port}").replace(
            "PORT", str(listener.port)
        )
        steps = {"expect": [{"contains": "text"}], "widths": [400, 500]}
        (verdict,) = judge_pages([page], steps, use_namespace=use_namespace)
        time.sleep(0.5)
        assert listener.hits == 1
    assert verdict.outcome is Outcome.FAIL


def processes_of(folder):
    """Processes whose command line names a browser's profile in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder / "cosr-web-") in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@needs_chromium
def test_nothing_is_left_behind_and_no_secret_goes_in(monkeypatch, tmp_path):
    monkeypatch.setenv("COSR_TEST_SECRET", "hunter2")
    monkeypatch.setattr(browser_module.tempfile, "tempdir", str(tmp_path))

    async def run():
        started = Browser(find_browser())
        await started.start()
        assert processes_of(tmp_path)
        for pid in processes_of(tmp_path):
            with contextlib.suppress(OSError):
                assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
        await started.close()

    asyncio.run(run())
    assert not processes_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_chromium
def test_the_browser_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import asyncio, os\n"
        "from cosr_jax.verifiers.browser import Browser, find_browser\n"
        "async def run():\n"
        "    browser = Browser(find_browser())\n"
        "    await browser.start()\n"
        "    print(browser._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(run())\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    group = int(result.stdout)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            time.sleep(0.1)
            continue
        break
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@needs_chromium
def test_a_killed_browser_is_an_error_and_the_next_page_gets_a_new_one():
    async def run():
        judge = WebJudge(max_pages=1)
        await judge.start()
        completion = Completion((), (), fenced(web_pages.HONEST_PAGE), "stop")

        async def kill_soon():
            while not (judge._slots[0]._browser and judge._slots[0]._browser._listeners):
                await asyncio.sleep(0.005)
            os.killpg(judge._slots[0]._browser._process.pid, 9)

        killer = asyncio.create_task(kill_soon())
        first = await judge.judge(web_task(), completion, PATIENT)
        await killer
        second = await judge.judge(web_task(), completion, PATIENT)
        await judge.close()
        return first, second

    first, second = asyncio.run(run())
    assert first.outcome is Outcome.ERROR
    assert second.outcome is Outcome.PASS


@needs_chromium
def test_a_cancelled_case_takes_its_browser_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(browser_module.tempfile, "tempdir", str(tmp_path))

    async def run():
        judge = WebJudge(max_pages=1)
        await judge.start()
        completion = Completion((), (), fenced("<html><script>for (;;);</script>"), "stop")
        case = asyncio.create_task(judge.judge(web_task(), completion, PATIENT))
        while not (judge._slots[0]._browser and judge._slots[0]._browser._listeners):
            await asyncio.sleep(0.01)
        case.cancel()
        with pytest.raises(asyncio.CancelledError):
            await case
        assert not processes_of(tmp_path)

    asyncio.run(run())


def test_without_chromium_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install chromium"):
        asyncio.run(WebJudge().start())
    with pytest.raises(UserError, match="no browser 'firefox'"):
        asyncio.run(WebJudge("firefox").start())


HTML = "<!DOCTYPE html><html><body>x</body></html>"


@pytest.mark.parametrize(
    ("text", "document"),
    [
        (f"```html\n{HTML}\n```", HTML),
        (f"```\n{HTML}\n```", HTML),
        (f"```HTML\r\n{HTML}\r\n```", HTML),
        (f"```html\n<p>draft</p>\n```\nBetter:\n```html\n{HTML}\n```", HTML),
        (f"```html\n{HTML}\n```\n```css\nbody {{}}\n```\n```js\nf()\n```", HTML),
        (f"```html\n{HTML}", HTML),
        (f"Sure!\n{HTML}\nDone.", HTML),
        (f"<answer>{HTML}</answer>", HTML),
        (f"<answer>\n```html\n{HTML}\n```\n</answer>", HTML),
        (f"<think>```html\n<p>no</p>\n```</think>{HTML}", HTML),
        ("<think>" + HTML + "</think>", ""),
        ("<think>" + HTML, ""),
        ("```python\nprint('<html>')\n```", ""),
        ("I cannot.", ""),
        ("", ""),
        ("\ud800", ""),
    ],
)
def test_the_document_is_found(text, document):
    found = extract_document(text)
    assert found.answer == document
    assert found.category == ("" if document else "no_code")


def test_a_document_that_was_cut_does_not_count():
    assert extract_document("```html\n<html><body>x", "length").category == "truncated"
    assert extract_document("<html><body>x", "length").category == "truncated"
    assert extract_document(f"```html\n{HTML}", "length").answer == HTML
    assert extract_document(f"{HTML} And", "length").answer == HTML


@pytest.mark.parametrize(
    "requirements",
    [
        "",
        "[]",
        "{}",
        '{"expect": []}',
        '{"expect": [{}]}',
        '{"expect": [{"role": 3}]}',
        '{"expect": [{"role": "button", "checked": "yes"}]}',
        '{"expect": [{"role": "button", "count": true}]}',
        '{"expect": [{"name": "Add"}]}',
        '{"expect": [{"role": "button", "colour": "red"}]}',
        '{"expect": [{"contains": "x"}], "contrast": 40}',
        '{"expect": [{"contains": "x"}], "widths": [0]}',
        '{"expect": [{"contains": "x"}], "scripts": []}',
        '{"steps": [{"do": "click"}]}',
        '{"steps": [{"do": "press", "key": "F13"}]}',
        '{"steps": [{"do": "eval", "target": {"role": "button"}}]}',
        "[" * 9999,
    ],
)
def test_requirements_that_cannot_be_read_are_the_tasks_fault(requirements):
    with pytest.raises(ValueError):
        read_requirements(requirements)
    judge = WebJudge()
    completion = Completion((), (), fenced(HTML), "stop")
    verdict = asyncio.run(judge.judge(web_task(requirements), completion, Limits()))
    assert (verdict.outcome, verdict.detail[:5]) == (Outcome.ERROR, "task:")


def test_contrast_follows_wcag():
    white, black = (255.0, 255.0, 255.0, 1.0), (0.0, 0.0, 0.0, 1.0)
    assert contrast.ratio_of(white, black) == pytest.approx(21)
    assert contrast.ratio_of((119.0, 119.0, 119.0, 1.0), white) == pytest.approx(4.48, abs=0.01)
    assert contrast.ratio_of((118.0, 118.0, 118.0, 1.0), white) == pytest.approx(4.54, abs=0.01)
    half = contrast.over((0.0, 0.0, 0.0, 0.5), white)
    assert half == pytest.approx((127.5, 127.5, 127.5, 1.0))
    assert contrast.over((0.0, 0.0, 0.0, 0.0), (9.0, 9.0, 9.0, 0.0))[3] == 0


MATERIAL = Material("Counter Add 0", "<html><h1>Counter of things</h1></html>")
GOOD = Verdict(Outcome.PASS, 1.0, value_correct=True)
FINE = Opinion(False, "")


def opinions(*answers, weight=0.4):
    rest = iter(answers)

    async def ask(item, material):
        answer = next(rest)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Checklist([f"item {n}" for n in range(len(answers))], ask, weight)


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        ([Opinion(True, "Counter  Add 0")], 0.6),
        ([Opinion(True, "Coun\ufffdter A d d\u200b 0")], 0.6),  # as prompts show hidden characters
        ([Opinion(True, "<h1>Counter of"), FINE], 0.8),
        ([FINE], 1.0),
        ([Opinion(True, "is not in the page")], 1.0),
        ([Opinion(True, "Add")], 1.0),  # too short to be evidence
        ([Opinion(True, "  \u200b        ")], 1.0),
        ([Unanswered("breaker_open")], 1.0),
    ],
)
def test_an_opinion_needs_evidence_and_only_lowers(answers, reward):
    verdict = asyncio.run(lowered(GOOD, opinions(*answers), MATERIAL))
    assert verdict.reward == pytest.approx(reward)
    assert verdict.is_subjective is (reward < 1.0)
    assert verdict.outcome is Outcome.PASS
    assert verdict.unanswered == sum(isinstance(a, Unanswered) for a in answers)


def test_what_is_no_lack_of_an_answer_is_not_taken_for_one():
    with pytest.raises(UserError, match="no recording"):
        asyncio.run(lowered(GOOD, opinions(FINE, UserError("no recording", "x")), MATERIAL))


def test_an_opinion_never_saves_a_failure_and_its_weight_is_capped():
    failed = Verdict(Outcome.FAIL, 0.0, category="wrong_answer")
    assert asyncio.run(lowered(failed, opinions(FINE), MATERIAL)) is failed
    partly = Verdict(Outcome.FAIL, 0.5, category="wrong_answer")
    assert asyncio.run(lowered(partly, opinions(FINE), MATERIAL)).reward == 0.5
    worse = opinions(Opinion(True, "Counter of things"))
    assert asyncio.run(lowered(partly, worse, MATERIAL)).reward == pytest.approx(0.3)
    only_passes = dataclasses.replace(worse, only_passes=True)
    assert asyncio.run(lowered(partly, only_passes, MATERIAL)) is partly
    for weight in (0, 0.6, -1):
        with pytest.raises(ValueError):
            opinions(FINE, weight=weight)


@needs_chromium
def test_the_checklist_sees_the_page_after_all_steps():
    seen = []

    async def ask(item, material):
        seen.append(material)
        return Opinion(True, "HELLO ADA")

    checklist = Checklist(["Is it friendly?"], ask, 0.25)
    (verdict,) = judge_pages([web_pages.HONEST_PAGE], tokens=(1,), checklist=checklist)
    assert (verdict.reward, verdict.is_subjective) == (0.75, True)
    assert "HELLO ADA" in seen[0].text and '<p id="hello">HELLO ADA</p>' in seen[0].markup
