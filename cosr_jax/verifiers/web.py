"""Judges web pages: what a page shows and does, in a headless Chromium without network.

``WebChecks.requirements`` is JSON; every key but one of "expect" and "steps" may be left out:

    {"expect": [STATE, ...],            of the page once loaded
     "steps": [{"do": "click" | "type" | "press", "target": TARGET, "text": what to type,
                "key": one of web_page.KEYS, "expect": [STATE, ...]}, ...]     one after the other
     "contrast": 4.5,                   least ratio of all visible text (WCAG; large text 3)
     "width": 1280,                     of the viewport in all that, in CSS pixels
     "widths": [360, 1280]}             at which nothing may run over the right edge

    TARGET  {"role": "button", "name": "Add"}, or without "name"; the accessible role and name
    STATE   TARGET with any of
              "text": its visible text, whole    "contains": a part of its visible text
              "value": of a field                "checked": true | false
              "visible": false, if it may not be seen or not be there; else it must be seen, unless
                         "text", "contains" or "value" say what is expected
              "count": how many there are; without it there must be one
            or {"text": ...} or {"contains": ...} alone: the whole page's visible text

Two checks are made of every page: it loads, and nothing goes wrong in it (console errors, uncaught
exceptions, requests for anything else).  ``web_page`` says why its scripts cannot change what is
read.  The reward is the share of expectations and steps that hold, times the share of the other
checks (to which "visible": false belongs), so that an empty page earns nothing; all together pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.types import Completion, Outcome, Task, Verdict, WebChecks
from cosr_jax.verifiers import contrast
from cosr_jax.verifiers.blocks import fences
from cosr_jax.verifiers.browser import (
    Browser,
    BrowserError,
    CommandRefused,
    PageCrash,
    PageFlood,
    find_browser,
)
from cosr_jax.verifiers.extraction import Extraction, final_text
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.web_checklist import Checklist, Material, lowered
from cosr_jax.verifiers.web_page import KEYS, Element, Page, View, fold

MAX_CHARACTERS = 200_000
_PAGES_PER_BROWSER = 50
_CPU_SHARE = 0.3  # of the wall clock: less, and it was not the page that took the time
_STRETCH = 3  # times the limit, on a machine that gives a page less than that share
_WARM_UP_S = 60.0


# --- Requirements ---


@dataclasses.dataclass(frozen=True)
class State:
    """What is expected of an element, or of the page if there is no role."""

    role: str = ""
    name: str | None = None
    text: str | None = None
    contains: str | None = None
    value: str | None = None
    checked: bool | None = None
    visible: bool | None = None
    count: int | None = None

    def __str__(self) -> str:
        named = f"{self.role} {self.name!r}" if self.name is not None else self.role
        return named or "page"

    def matches(self, element: Element) -> bool:
        return element.role == self.role and self.name in (None, element.name)


@dataclasses.dataclass(frozen=True)
class Step:
    """One action of a user, and what it must lead to."""

    do: str
    target: State | None
    text: str
    key: str
    expect: tuple[State, ...]


@dataclasses.dataclass(frozen=True)
class Requirements:
    """``WebChecks.requirements``, read."""

    expect: tuple[State, ...]
    steps: tuple[Step, ...]
    contrast: float
    width: int
    widths: tuple[int, ...]


def read_requirements(text: str) -> Requirements:
    """Reads the JSON described above.

    Raises:
      ValueError: it is not of that form.
    """
    try:
        fields = _fields(json.loads(text), "expect", "steps", "contrast", "width", "widths")
        expect = tuple(_state(s) for s in _list(fields.get("expect", [])))
        steps = tuple(_step(s) for s in _list(fields.get("steps", [])))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if all(state.visible is False for state in expect) and not steps:
        raise ValueError("nothing is expected of the page")
    least = fields.get("contrast", 1)
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 1 <= least <= 21:
        raise ValueError(f"contrast is {least!r}, not a number from 1 to 21")
    widths = tuple(_width(w) for w in _list(fields.get("widths", [])))
    return Requirements(expect, steps, float(least), _width(fields.get("width", 1280)), widths)


def _fields(value: object, *names: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not set(value) <= set(names):
        raise ValueError(f"{value!r:.80} is no object with {', '.join(names)}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.80} is no list")
    return value


def _width(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 100 <= value <= 4000:
        raise ValueError(f"{value!r:.80} is no width from 100 to 4000 pixels")
    return value


_TYPES = {f.name: f.type for f in dataclasses.fields(State)}


def _state(value: object) -> State:
    fields = _fields(value, *_TYPES)
    for name, given in fields.items():
        wanted = {"checked": bool, "visible": bool, "count": int}.get(name, str)
        if type(given) is not wanted:
            raise ValueError(f"{name} is {given!r:.40}, not of type {wanted.__name__}")
    state = State(**fields)
    if not state.role and (set(fields) - {"text", "contains"} or not fields):
        raise ValueError(f"{value!r:.80} names no role")
    return state


def _step(value: object) -> Step:
    fields = _fields(value, "do", "target", "text", "key", "expect")
    target = _state(fields["target"]) if "target" in fields else None
    do, text, key = (fields.get(name, "") for name in ("do", "text", "key"))
    if do not in ("click", "type", "press") or (do != "press" and target is None):
        raise ValueError(f"{value!r:.80} does nothing to anything")
    if (do == "press" and key not in KEYS) or not isinstance(text, str):
        raise ValueError(f"{value!r:.80}: keys are {', '.join(KEYS)}")
    return Step(do, target, text, key, tuple(_state(s) for s in _list(fields.get("expect", []))))


# --- The document in a completion ---

_MARKUP = re.compile(r"<(?:!doctype|html|head|body|[a-z][a-z0-9]*)[\s>]", re.IGNORECASE)
_WHOLE = re.compile(r"<!doctype|<html", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})", re.MULTILINE)
_LABELS = ("html", "htm", "xhtml", "xml")
_END = re.compile(r"</html\s*>", re.IGNORECASE)


def extract_document(text: str, finish_reason: str = "stop") -> Extraction:
    """The last fenced block of HTML, or else what goes from a doctype to ``</html>``, unfenced.

    An unclosed block counts unless the length limit cut it before ``</html>``.
    """
    was_cut = finish_reason == "length"
    final = final_text(text)
    start = final.rfind("<answer>")
    if start >= 0 and "</answer>" in final[start:]:
        final = final[start + len("<answer>") :].rpartition("</answer>")[0]
    nothing = Extraction("", "", "truncated" if was_cut else "no_code")
    found: Extraction | None = None
    for label, content, is_closed in fences(final):
        is_html = label in _LABELS or (not label and _MARKUP.match(content))
        if is_html and _MARKUP.search(content):
            is_whole = is_closed or not was_cut or bool(_END.search(content))
            found = Extraction(content, "fence") if is_whole else nothing
    if found:
        return found
    final = _FENCE.split(final, maxsplit=1)[0]  # other fences hold other languages
    whole = _WHOLE.search(final)
    if whole is None or (was_cut and not _END.search(final)):
        return nothing
    ends = [match.end() for match in _END.finditer(final, whole.start())]
    return Extraction(final[whole.start() : ends[-1] if ends else len(final)].strip(), "bare")


# --- Checks ---


@dataclasses.dataclass
class Report:
    """What was checked; complaints are empty where a check held."""

    functions: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    quality: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def reward(self) -> float:
        """The share of functions that hold times that of the other checks."""
        return _share(self.functions) * _share(self.quality)

    @property
    def complaints(self) -> str:
        """All that did not hold, in a line."""
        wrong = [f"{name}: {what}" for name, what in (*self.quality, *self.functions) if what]
        return "; ".join(wrong)[:1000]


def _share(checks: Sequence[tuple[str, str]]) -> float:
    return sum(not what for _, what in checks) / len(checks)


async def check_page(page: Page, wanted: Requirements) -> Report:
    """Makes all checks of an open page; widths come last, since they change the layout."""
    report = Report()
    for number, state in enumerate(wanted.expect, 1):
        # What an empty page does not show either is no function.
        checks = report.quality if state.visible is False else report.functions
        checks.append((f"expect {number}", await _complaint(page, state)))
    colours = [await _contrast(page, wanted)] if wanted.contrast > 1 else []
    for number, step in enumerate(wanted.steps, 1):
        report.functions.append((f"step {number}", await _take(page, step)))
    if wanted.contrast > 1 and wanted.steps:
        colours.append(await _contrast(page, wanted))
    if colours:
        report.quality.append(("contrast", next((c for c in colours if c), "")))
    for width in wanted.widths:
        report.quality.append((f"width {width}", await _overflow(page, width)))
    report.quality.append(("console", "; ".join(page.errors[:3])))
    return report


async def _take(page: Page, step: Step) -> str:
    """Takes a step; says what is wrong with it or with what it led to."""
    what = ""
    if step.target:
        found = [e for e in await page.elements() if step.target.matches(e)]
        if len(found) != 1:
            return f"{len(found)} elements are {step.target}"
        if step.do == "type":
            what = await page.type_text(found[0], step.text)
        elif step.do == "click":
            what = await page.click(found[0])
        else:
            what = await page.focus(found[0])
    if step.do == "press" and not what:
        what = await page.press(step.key)
    if what:
        return f"{step.target} {what}"
    for state in step.expect:
        if complaint := await _complaint(page, state):
            return f"after {step.do}: {complaint}"
    return ""


async def _complaint(page: Page, state: State) -> str:
    """What keeps ``state`` from holding; "" if it holds."""
    view = await page.view()
    if not state.role:
        return await _text_complaint(page, view, state, None)
    found = [e for e in await page.elements() if state.matches(e)]
    if state.visible is False:
        return f"{state} can be seen" if any(view.shows(e.node) for e in found) else ""
    if len(found) != (1 if state.count is None else state.count):
        return f"{len(found)} elements are {state}"
    says = (state.text, state.contains, state.value)
    for element in found:
        if state.visible or says == (None, None, None):
            if not view.shows(element.node):
                return f"{state} cannot be seen"
            if not await page.is_uncovered(element):
                return f"{state} is covered"
        if state.checked is not None and element.checked != str(state.checked).lower():
            return f"{state} is checked: {element.checked or 'cannot be'}"
        if state.value is not None and element.value != state.value:
            return f"{state} has value {element.value[:80]!r}, not {state.value[:80]!r}"
        if complaint := await _text_complaint(page, view, state, element.node):
            return complaint
    return ""


async def _text_complaint(page: Page, view: View, state: State, node: int | None) -> str:
    if state.text is None and state.contains is None:
        return ""
    text = view.text(node)
    if state.text is not None and text != fold(state.text):
        return f"{state} shows {text[:80]!r}, not {state.text[:80]!r}"
    if state.contains is not None and fold(state.contains) not in text:
        return f"{state} shows {text[:80]!r}, without {state.contains[:80]!r}"
    for box in view.texts(node):
        if node is not None and not await page.is_shown(box, view):
            return f"{state}: {fold(box.text)[:40]!r} is covered"
    return ""


async def _contrast(page: Page, wanted: Requirements) -> str:
    view = await page.view()
    texts = view.texts()
    if not texts:
        return "no text can be seen"
    pixels = await page.pixels(view)
    for box in texts:
        if what := contrast.complaint(box, view, wanted.contrast, pixels):
            return f"{fold(box.text)[:40]!r}: {what}"
    return ""


async def _overflow(page: Page, width: int) -> str:
    await page.resize(width)
    await page.settle()
    view = await page.view()
    if view.width > width + 1:
        return f"the page is {view.width:g} wide"
    for box in view.boxes:  # cut off by "overflow: hidden" is not fitting in either
        right = box.x + box.width
        if not box.text.strip() or not box.has_size or right <= width + 1:
            continue
        if not view.is_clipped(box, ("auto", "scroll")):
            return f"{fold(box.text)[:40]!r} runs to {right:g}"
    return ""


# --- The judge ---


class WebJudge:
    """Implements ``judges.Judge`` for tasks with ``WebChecks``.

    Args:
      browser: name or path of the Chromium to run; "": the first that is found.
      max_pages: browsers, each with one page at a time.
      use_namespace: see ``browser.Browser``.
      checklist: what a language model is asked afterwards about pages that a student made
        (``Completion.token_ids``; references and canaries have none); None: nothing.
    """

    def __init__(
        self,
        browser: str = "",
        max_pages: int = 2,
        use_namespace: bool = True,
        checklist: Checklist | None = None,
    ):
        self._name, self._max_pages, self._use_namespace = browser, max_pages, use_namespace
        self._checklist = checklist
        self._executable = ""
        self._free: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()
        self._slots: list[_Slot] = []

    async def start(self) -> None:
        """Looks for Chromium; browsers start with the first pages.

        Raises:
          UserError: there is none.
        """
        self._executable = find_browser(self._name)
        self._slots = [_Slot(self._executable, self._use_namespace) for _ in range(self._max_pages)]
        for slot in self._slots:
            self._free.put_nowait(slot)

    async def close(self) -> None:
        """Kills the browsers."""
        for slot in self._slots:
            await slot.drop()

    async def judge(self, task: Task, completion: Completion, limits: Limits) -> Verdict:
        """The verdict on the page in ``completion``; unreadable requirements are an ERROR."""
        began = time.perf_counter()
        checks = task.checks
        assert isinstance(checks, WebChecks)
        verdict = await self._judge(checks, completion, limits)
        return dataclasses.replace(verdict, seconds=time.perf_counter() - began)

    async def _judge(self, checks: WebChecks, completion: Completion, limits: Limits) -> Verdict:
        try:
            wanted = read_requirements(checks.requirements)
        except ValueError as error:
            return Verdict(Outcome.ERROR, 0.0, detail=f"task: {error}")
        found = extract_document(completion.text, completion.finish_reason)
        if found.category:
            return _failure(found, found.category)
        if len(found.answer) > MAX_CHARACTERS:
            return _failure(found, "forbidden", f"more than {MAX_CHARACTERS} characters")
        checklist = self._checklist if completion.token_ids else None
        slot = await self._free.get()
        try:
            verdict, material = await self._visit(slot, found, wanted, limits.wall_s, checklist)
        finally:
            self._free.put_nowait(slot)
        return await lowered(verdict, checklist, material) if checklist and material else verdict

    async def _visit(
        self,
        slot: _Slot,
        found: Extraction,
        wanted: Requirements,
        wall_s: float,
        checklist: Checklist | None,
    ) -> tuple[Verdict, Material | None]:
        """The verdict on a page, and what the checklist needs if it concerns such a verdict.

        The browser of ``slot`` is gone afterwards unless all went well.
        """
        is_well, page = False, None
        try:
            browser = await slot.take()
            cpu_s = browser.cpu_seconds()
            page = Page(browser)
            looking = asyncio.ensure_future(_look(page, found, wanted, checklist))
            waited_s, is_to_blame = 0.0, False
            try:
                while not (looking.done() or is_to_blame or waited_s >= _STRETCH * wall_s):
                    await asyncio.wait({looking}, timeout=wall_s)
                    waited_s += wall_s
                    spent = browser.cpu_seconds() - cpu_s
                    is_to_blame = page.has_left or spent >= _CPU_SHARE * wall_s
                if looking.done():
                    verdict, material = looking.result()
                    is_well = True
                    return verdict, material
            finally:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
            detail = f"no end within {waited_s:g} s ({spent:.2g} s of CPU time)"
            if is_to_blame:
                return _failure(found, "timeout", detail), None
            return Verdict(Outcome.ERROR, 0.0, detail=detail), None
        except CommandRefused as error:  # a page that is leaving, for instance
            return _failure(found, "runtime_error", str(error)), None
        except BrowserError as error:
            return Verdict(Outcome.ERROR, 0.0, detail=str(error)), None
        except PageFlood as error:
            return _failure(found, "output_limit", str(error)), None
        except PageCrash as error:
            return _failure(found, "crash", str(error)), None
        finally:
            if not is_well:
                if page:
                    page.release()
                await slot.drop()


async def _look(
    page: Page, found: Extraction, wanted: Requirements, checklist: Checklist | None
) -> tuple[Verdict, Material | None]:
    await page.open(found.answer, wanted.width)
    verdict = _verdict(found, await check_page(page, wanted))
    material = None
    if checklist is not None and checklist.concerns(verdict):
        material = Material((await page.view()).text(), await page.markup())
    await page.close()
    return verdict, material


class _Slot:
    """A place for a browser, which is started when needed and replaced after a while."""

    def __init__(self, executable: str, use_namespace: bool):
        self._executable, self._use_namespace = executable, use_namespace
        self._browser: Browser | None = None
        self._pages = 0

    async def take(self) -> Browser:
        """A running browser.

        Raises:
          BrowserError: it does not start.
        """
        if self._browser is None or self._browser.has_failed or self._pages >= _PAGES_PER_BROWSER:
            await self.drop()
            self._browser = Browser(self._executable, self._use_namespace)
            self._pages = 0
            await self._browser.start()
            await _warm_up(self._browser)
        self._pages += 1
        return self._browser

    async def drop(self) -> None:
        """Kills the browser, if there is one."""
        browser, self._browser = self._browser, None
        if browser:
            await browser.close()


async def _warm_up(browser: Browser) -> None:
    """Shows and draws a page of ours: what a browser does only once is not on a student's time.

    Raises:
      BrowserError: it cannot.
    """
    page = Page(browser)
    try:
        async with asyncio.timeout(_WARM_UP_S):
            await page.open("<!DOCTYPE html><title>page</title><p>page", 1280)
            await page.elements()
            await page.pixels(await page.view())
            await page.close()
    except (TimeoutError, CommandRefused, PageCrash, PageFlood) as error:
        page.release()
        raise BrowserError(f"a new browser shows no page: {error!r}") from error


def _verdict(found: Extraction, report: Report) -> Verdict:
    complaints = report.complaints
    if not complaints:
        return Verdict(
            Outcome.PASS, 1.0, answer=found.answer, method=found.method, value_correct=True
        )
    only_errors = not any(what for _, what in report.functions)
    is_error = only_errors and dict(report.quality)["console"]
    category = "runtime_error" if is_error else "wrong_answer"
    return _failure(found, category, complaints, report.reward)


def _failure(found: Extraction, category: str, detail: str = "", reward: float = 0.0) -> Verdict:
    return Verdict(
        Outcome.FAIL,
        reward,
        category=category,
        answer=found.answer,
        method=found.method,
        detail=detail,
    )
