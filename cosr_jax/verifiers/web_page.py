"""A page under test: loaded from memory, acted on like a user, and read from outside.

No script of ours ever runs in the page: what is there is read from the browser's accessibility
tree, its layout and its pixels, which the page's scripts cannot patch.  Between actions the page's
clock stands still; each action is followed by the same stretch of the page's own time, however
busy the machine is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.verifiers.browser import Browser, BrowserError, CommandRefused, PageCrash, PageFlood

#: A reserved name (RFC 2606); as an https origin it has storage like any real page.
ADDRESS = "https://page.test/"
SETTLE_MS = 1000  # of the page's clock, after loading and after each action
HEIGHT = 800
_MAX_DOCUMENTS = 5  # a page that loads itself again and again never settles
_LEAVING_S = 0.5
_MAX_SIDE = 4000  # CSS pixels of what is looked at
_MAX_NODES, _MAX_DEPTH = 10_000, 200
_MAX_EVENTS = 2000  # messages, requests, dialogs and windows together

_STYLES = (
    *("visibility", "opacity", "color", "-webkit-text-fill-color", "background-color"),
    *("background-image", "font-size", "font-weight", "filter", "backdrop-filter"),
    *("mix-blend-mode", "mask-image", "clip-path", "overflow-x"),
)

_DOMAINS = ("Page", "Runtime", "Log", "DOM", "Accessibility", "Performance", "Inspector")

#: Keys that "press" knows: DOM key, key code, text.
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Space": (" ", 32, " "),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    "Delete": ("Delete", 46, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
}


@dataclasses.dataclass(frozen=True)
class Element:
    """A node of the accessibility tree."""

    node: int  # the DOM's backend id
    role: str
    name: str
    value: str
    checked: str  # "true", "false", "mixed", or "" where nothing can be checked


@dataclasses.dataclass(frozen=True)
class Box:
    """A laid-out piece of the page, in CSS pixels from the top left of the document."""

    node: int  # index into ``View.parents``
    x: float
    y: float
    width: float
    height: float
    text: str
    styles: Mapping[str, str]

    @property
    def has_size(self) -> bool:
        return self.width >= 1 and self.height >= 1


@dataclasses.dataclass(frozen=True)
class View:
    """The page as it is laid out now."""

    parents: Sequence[int]  # index of each node's parent, -1 at the top
    nodes: Mapping[int, int]  # backend id -> index
    boxes: Sequence[Box]
    width: float  # of the document
    frames: Mapping[int, Box]  # of the elements that are laid out, by index

    def lineage(self, index: int) -> list[int]:
        """The node and its ancestors, inside out."""
        line = []
        while index >= 0:
            line.append(index)
            index = self.parents[index]
        return line

    def opacity(self, index: int) -> float:
        """Of the node with its ancestors."""
        product = 1.0
        for node in self.lineage(index):
            if frame := self.frames.get(node):
                product *= float(frame.styles["opacity"])
        return product

    def is_visible(self, box: Box) -> bool:
        """Laid out with some size inside the document, not hidden, not transparent, not tiny."""
        return (
            box.has_size
            and not self.is_clipped(box)
            and box.x + box.width > 0
            and box.y + box.height > 0
            and box.x < max(self.width, 1)
            and box.styles["visibility"] == "visible"
            and self.opacity(box.node) >= 0.1
            and (not box.text or float(box.styles["font-size"].removesuffix("px")) >= 6)
        )

    def is_clipped(self, box: Box, by: Sequence[str] = ("hidden", "clip")) -> bool:
        """Whether its middle lies outside of an ancestor whose overflow is one of ``by``."""
        x, y = box.x + box.width / 2, box.y + box.height / 2
        for index in self.lineage(box.node)[1:]:
            frame = self.frames.get(index)
            if frame is None or frame.styles["overflow-x"] not in by:
                continue
            inside_x = frame.x <= x <= frame.x + frame.width
            if not (inside_x and frame.y <= y <= frame.y + frame.height):
                return True
        return False

    def texts(self, node: int | None = None) -> list[Box]:
        """Visible boxes with text, of the document or of the element with backend id ``node``."""
        found = [b for b in self.boxes if b.text.strip() and self.is_visible(b)]
        if node is None:
            return found
        root = self.nodes.get(node, -2)
        return [box for box in found if root in self.lineage(box.node)]

    def text(self, node: int | None = None) -> str:
        """Visible text, with single blanks."""
        return join_texts(self.texts(node))

    def shows(self, node: int) -> bool:
        """Whether the element with backend id ``node``, or something in it, can be seen."""
        root = self.nodes.get(node, -2)
        return any(self.is_visible(b) for b in self.boxes if root in self.lineage(b.node))


def join_texts(boxes: Sequence[Box]) -> str:
    """Their text in order; what touches on one line is one word."""
    pieces: list[str] = []
    last: Box | None = None
    for box in boxes:
        touches = last and abs(last.x + last.width - box.x) < 1 and abs(last.y - box.y) < box.height
        pieces += [box.text] if touches or not last else [" ", box.text]
        last = box
    return fold("".join(pieces))


def fold(text: str) -> str:
    """``text`` with single blanks, and none around."""
    return " ".join(text.split())


class Page:
    """One document in a browsing context of its own."""

    def __init__(self, browser: Browser):
        self._browser = browser
        self._context = self._target = self._session = ""
        self._document = b""
        self._loaded = asyncio.Event()
        self._expired = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: Exception = PageCrash("the page's process died")
        self._documents = self._events = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.errors: list[str] = []  # on the console, uncaught, or requests that were refused

    async def open(self, document: str, width: int) -> None:
        """Loads ``document`` and lets it settle.

        Raises:
          PageCrash: its renderer died.
          BrowserError: the browser is to blame.
          CommandRefused: it left before it could be read.
        """
        send = self._browser.send
        self._document = document.encode(errors="replace")
        self._context = (await send("Target.createBrowserContext"))["browserContextId"]
        where = {"url": "about:blank", "browserContextId": self._context}
        self._target = (await send("Target.createTarget", where))["targetId"]
        attach = {"targetId": self._target, "flatten": True}
        self._session = (await send("Target.attachToTarget", attach))["sessionId"]
        self._browser.listen(self._session, self._on_event)
        self._browser.listen("", self._on_browser_event)
        downloads = {"behavior": "deny", "browserContextId": self._context}
        await asyncio.gather(  # the browser takes them in order, and nobody waits for each
            send("Target.setDiscoverTargets", {"discover": True}),
            send("Browser.setDownloadBehavior", downloads),
            *(self._send(f"{domain}.enable") for domain in _DOMAINS),
            self._send("Fetch.enable", {"patterns": [{"urlPattern": "*"}]}),
            self.resize(width),
        )
        await self._send("Page.navigate", {"url": ADDRESS})
        await self._unless_ended(self._loaded.wait())
        await self.settle()

    @property
    def has_left(self) -> bool:
        """Whether it loaded another document, or itself again."""
        return self._documents > 1

    async def close(self) -> None:
        """Ends the context with all it holds."""
        self.release()
        context = {"browserContextId": self._context}
        await self._browser.send("Target.disposeBrowserContext", context)

    def release(self) -> None:
        """Stops listening; for a page whose browser is given up."""
        for task in self._tasks:
            task.cancel()
        self._browser.forget(self._session)
        self._browser.forget("")

    async def resize(self, width: int) -> None:
        """Gives the viewport a width in CSS pixels."""
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        await self._send("Emulation.setDeviceMetricsOverride", metrics)

    async def settle(self) -> None:
        """Lets ``SETTLE_MS`` of the page's time pass, and as much again after a frame is drawn."""
        await self._advance()
        # No frame is due while the clock stands, and what waits for one would wait for ever.
        clip = {"x": 0, "y": 0, "width": 1, "height": 1, "scale": 1}
        await self._send("Page.captureScreenshot", {"clip": clip, "optimizeForSpeed": True})
        await self._advance()

    async def _advance(self) -> None:
        budget = {"policy": "advance", "budget": SETTLE_MS}
        for _ in range(_MAX_DOCUMENTS):
            self._expired.clear()
            await self._send("Emulation.setVirtualTimePolicy", budget)
            await self._unless_ended(self._expired.wait())
            if self._loaded.is_set():
                return
            with contextlib.suppress(TimeoutError):  # it is on its way to another document
                async with asyncio.timeout(_LEAVING_S):
                    await self._unless_ended(self._loaded.wait())
        raise CommandRefused("the page does not stay")

    async def elements(self) -> list[Element]:
        """What assistive technology is told of the page, in its order.

        Raises:
          PageFlood: it has too many nodes.
        """
        await self._check_size()
        tree = await self._send("Accessibility.getFullAXTree")
        return [_element(node) for node in tree["nodes"] if _is_told(node)]

    async def view(self) -> View:
        """The layout.

        Raises:
          PageFlood: it has too many nodes, or too deep ones.
        """
        await self._check_size()
        snapshot = await self._send(
            "DOMSnapshot.captureSnapshot", {"computedStyles": _STYLES, "includeDOMRects": True}
        )
        return _view(snapshot)

    async def _check_size(self) -> None:
        metrics = (await self._send("Performance.getMetrics"))["metrics"]
        nodes = next(metric["value"] for metric in metrics if metric["name"] == "Nodes")
        if nodes > _MAX_NODES:
            raise PageFlood(f"the page has more than {_MAX_NODES} nodes")

    async def pixels(self, view: View) -> Any:
        """The rendered document, as an array [height, width, 3] of bytes."""
        import numpy as np
        from PIL import Image

        bottom = max((box.y + box.height for box in view.boxes), default=1)
        width, height = (min(_MAX_SIDE, max(1, side)) for side in (view.width, bottom))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = await self._send(
            "Page.captureScreenshot",
            {"format": "png", "clip": clip, "captureBeyondViewport": True, "fromSurface": True},
        )
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
        return np.asarray(image.convert("RGB"))

    async def click(self, element: Element) -> str:
        """Clicks the middle of ``element`` if that is what is there; else says what is wrong."""
        place = await self._middle(element.node)
        if place is None:
            return "has no place on the page"
        if not await self._is_on_top(element, *place):
            return "is covered by something else"
        await self._mouse("mousePressed", *place)
        await self._mouse("mouseReleased", *place)
        await self.settle()
        return ""

    async def is_uncovered(self, element: Element) -> bool:
        """Whether the middle of ``element``, scrolled to, is the element or something in it."""
        place = await self._middle(element.node)
        return place is not None and await self._is_on_top(element, *place)

    async def type_text(self, element: Element, text: str) -> str:
        """Replaces what is in ``element`` with ``text``, key by key; else says what is wrong."""
        complaint = await self.click(element)
        if complaint:
            return complaint
        await self._key("a", 65, "", commands=("selectAll",))
        await self._key(*KEYS["Delete"])
        for character in text:
            await self._key(character, 0, character)
        await self.settle()
        return ""

    async def focus(self, element: Element) -> str:
        """Gives ``element`` the keyboard; else says what is wrong."""
        try:
            await self._send("DOM.focus", {"backendNodeId": element.node})
        except CommandRefused as error:
            return f"cannot have the keyboard ({error})"
        return ""

    async def press(self, key: str) -> str:
        """Presses one of ``KEYS``."""
        await self._key(*KEYS[key])
        await self.settle()
        return ""

    async def markup(self) -> str:
        """The document as it stands now, as HTML."""
        root = (await self._send("DOM.getDocument", {"depth": 0}))["root"]["backendNodeId"]
        return str((await self._send("DOM.getOuterHTML", {"backendNodeId": root}))["outerHTML"])

    async def is_shown(self, box: Box, view: View) -> bool:
        """Whether the middle of ``box``, scrolled to, is not covered by something else."""
        node = next((n for n, index in view.nodes.items() if index == box.node), None)
        place = await self._middle(node)
        if place is None:
            return False
        hit = await self._node_at(*place)
        # The text itself, or what holds it: text nodes are not always hit by themselves.
        return hit is not None and view.nodes.get(hit, -2) in view.lineage(box.node)[:2]

    async def _middle(self, node: int | None) -> tuple[float, float] | None:
        """Scrolls to a node; its middle in the viewport, or None if it takes no place."""
        where = {"backendNodeId": node}
        try:
            await self._send("DOM.scrollIntoViewIfNeeded", where)
            quads = (await self._send("DOM.getContentQuads", where))["quads"]
        except CommandRefused:  # it is not laid out
            return None
        return (sum(quads[0][0::2]) / 4, sum(quads[0][1::2]) / 4) if quads else None

    async def _is_on_top(self, element: Element, x: float, y: float) -> bool:
        hit = await self._node_at(x, y)
        if hit is None:
            return False
        view = await self.view()
        return view.nodes.get(element.node, -2) in view.lineage(view.nodes.get(hit, -1))

    async def _node_at(self, x: float, y: float) -> int | None:
        """What is uppermost at a place in the viewport."""
        scrolled = (await self._send("Page.getLayoutMetrics"))["cssVisualViewport"]
        left, top = scrolled["pageX"], scrolled["pageY"]
        where = {"x": round(x + left), "y": round(y + top), "ignorePointerEventsNone": True}
        try:
            return int((await self._send("DOM.getNodeForLocation", where))["backendNodeId"])
        except CommandRefused:
            return None  # outside of the viewport

    async def _mouse(self, kind: str, x: float, y: float) -> None:
        event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        await self._send("Input.dispatchMouseEvent", event)

    async def _key(self, key: str, code: int, text: str, commands: Sequence[str] = ()) -> None:
        event = {"key": key, "windowsVirtualKeyCode": code, "commands": list(commands)}
        kind = "keyDown" if text else "rawKeyDown"
        await self._send("Input.dispatchKeyEvent", {"type": kind, "text": text, **event})
        await self._send("Input.dispatchKeyEvent", {"type": "keyUp", **event, "commands": []})

    async def _send(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return await self._unless_ended(self._browser.send(method, params, self._session))

    async def _unless_ended(self, awaitable: Any) -> Any:
        task = asyncio.ensure_future(awaitable)
        if self._ended.is_set():
            task.cancel()
            raise self._end
        end = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._end
            return task.result()
        finally:
            for pending in (task, end):
                pending.cancel()

    def _on_browser_event(self, method: str, params: Mapping[str, Any]) -> None:
        """A page that opens another sees it closed."""
        info = params.get("targetInfo", {})
        if (
            method == "Target.targetCreated"
            and info.get("type") == "page"
            and info.get("browserContextId") == self._context
            and info.get("targetId") != self._target
        ):
            self._count(_WINDOW_COST)
            self._later("Target.closeTarget", {"targetId": info["targetId"]}, "")

    def _on_event(self, method: str, params: Mapping[str, Any]) -> None:
        self._count(_COSTS.get(method, 0))
        match method:
            case "Page.frameStartedNavigating" if params["frameId"] == self._target:
                self._loaded.clear()
            case "Page.loadEventFired":
                self._loaded.set()
            case "Emulation.virtualTimeBudgetExpired":
                self._expired.set()
            case "Inspector.targetCrashed" | "Inspector.detached":
                self._ended.set()
            case "Page.frameNavigated" if "parentId" not in params["frame"]:
                self._documents += 1
                if params["frame"]["url"] != ADDRESS:
                    self._note(f"the page went to {params['frame']['url']}")
                if self._documents > _MAX_DOCUMENTS:
                    self._end = CommandRefused("the page does not stay")
                    self._ended.set()
            case "Fetch.requestPaused":
                self._answer(params)
            case "Page.javascriptDialogOpening":
                self._later("Page.handleJavaScriptDialog", {"accept": True}, self._session)
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                text = details.get("exception", {}).get("description") or details["text"]
                self._note(f"uncaught {text}")
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                first: Mapping[str, Any] = next(iter(params["args"]), {})
                self._note(f"console: {first.get('value', first.get('description', ''))}")
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                entry = params["entry"]
                self._note(f"{entry['text']} {entry.get('url', '')[:100]}")

    def _answer(self, params: Mapping[str, Any]) -> None:
        """The page itself for its own address, nothing for its icon, and no for all else."""
        url, request = params["request"]["url"], {"requestId": params["requestId"]}
        if url == ADDRESS:
            headers = [{"name": "Content-Type", "value": "text/html; charset=utf-8"}]
            body = base64.b64encode(self._document).decode()
            answer = {"responseCode": 200, "responseHeaders": headers, "body": body}
            self._later("Fetch.fulfillRequest", {**request, **answer}, self._session)
        elif url == f"{ADDRESS}favicon.ico":
            self._later("Fetch.fulfillRequest", {**request, "responseCode": 204}, self._session)
        else:
            refusal = {**request, "errorReason": "BlockedByClient"}
            self._later("Fetch.failRequest", refusal, self._session)

    def _count(self, cost: int) -> None:
        self._events += cost
        if self._events > _MAX_EVENTS:
            self._end = PageFlood("too many messages, requests, dialogs or windows")
            self._ended.set()

    def _note(self, error: str) -> None:
        if len(self.errors) < 20:
            self.errors.append(fold(error)[:200])

    def _later(self, method: str, params: Mapping[str, Any], session: str) -> None:
        """Sends what an event calls for; what it is about may be gone by then."""

        async def send() -> None:
            with contextlib.suppress(BrowserError, CommandRefused, PageFlood):
                await self._browser.send(method, params, session)

        task = asyncio.ensure_future(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_WINDOW_COST = 20  # of a window or dialog, in requests
_COSTS = {
    "Page.javascriptDialogOpening": _WINDOW_COST,
    **dict.fromkeys(("Fetch.requestPaused", "Runtime.exceptionThrown"), 1),
    **dict.fromkeys(("Runtime.consoleAPICalled", "Log.entryAdded"), 1),
}


def _is_told(node: Mapping[str, Any]) -> bool:
    return not node["ignored"] and "backendDOMNodeId" in node


def _element(node: Mapping[str, Any]) -> Element:
    properties = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
    role = str(node["role"].get("value", ""))
    return Element(
        node["backendDOMNodeId"],
        {"image": "img"}.get(role, role),
        fold(str(node.get("name", {}).get("value", ""))),
        str(node.get("value", {}).get("value", "")),
        str(properties.get("checked", "")),
    )


def _view(snapshot: Mapping[str, Any]) -> View:
    strings, document = snapshot["strings"], snapshot["documents"][0]
    layout, nodes = document["layout"], document["nodes"]
    depths: list[int] = []
    for parent in nodes["parentIndex"]:  # parents come first
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    if max(depths) > _MAX_DEPTH:
        raise PageFlood(f"the page is nested more than {_MAX_DEPTH} deep")
    boxes: list[Box] = []
    frames: dict[int, Box] = {}
    for index, values, bounds, text in zip(
        layout["nodeIndex"], layout["styles"], layout["bounds"], layout["text"], strict=True
    ):
        if strings[nodes["nodeName"][index]] == "::marker":
            continue  # a list's bullets are not its text
        x, y, width, height = bounds
        own = {name: strings[v] for name, v in zip(_STYLES, values, strict=False)}
        if not own:  # text is laid out in the styles of what holds it
            holder = frames.get(nodes["parentIndex"][index])
            if holder is None:
                continue  # a marker's text
            own = dict(holder.styles)
        box = Box(index, x, y, width, height, strings[text] if text >= 0 else "", own)
        boxes.append(box)
        if not box.text:
            frames[index] = box
    return View(
        nodes["parentIndex"],
        {backend: index for index, backend in enumerate(nodes["backendNodeId"])},
        boxes,
        float(document.get("contentWidth", 0)),
        frames,
    )
