"""A headless Chromium of the system, driven through two pipes, without network.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) travels as JSON, each
message ended by a zero byte, over file descriptors 3 and 4 (``--remote-debugging-pipe``): no port
is opened that another program could reach, and no package is needed.  When the pipes close, by
whatever end of this process, the browser ends by itself.

What keeps a page off the network: a network namespace of its own where the kernel allows one; no
name resolves, and everything, loopback too, goes to a proxy that does not exist; and each request
but that for the page itself is refused before it is made.  The environment holds no variable of
ours, the profile is new and deleted at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosr_jax.types import UserError

_NAMES = (
    *("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome"),
    "chrome-headless-shell",
)
_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"),
    *("--disable-gpu", "--disable-extensions", "--disable-sync", "--disable-component-update"),
    *("--disable-background-networking", "--disable-default-apps", "--disable-domain-reliability"),
    *("--disable-breakpad", "--disable-crash-reporter", "--disable-client-side-phishing-detection"),
    *("--disable-quic", "--disable-dev-shm-usage", "--disable-popup-blocking", "--mute-audio"),
    *("--no-pings", "--metrics-recording-only", "--hide-scrollbars", "--password-store=basic"),
    *("--force-color-profile=srgb", "--force-device-scale-factor=1", "--lang=en-US"),
    # In a process of its own the compositor of a fresh browser loses screenshots now and then:
    # their answers never come, however long one waits.
    "--in-process-gpu",
    # MiB of a page's heap (more, and it crashes); and Math.random() that says the same each time.
    "--js-flags=--max-old-space-size=256,--random-seed=1",
    "--disable-features=Translate,MediaRouter,OptimizationHints,DialMediaRouteProvider",
    # Addresses are no names, so loopback is led to the dead proxy as well.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=socks5://0.0.0.0:1",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
)
_START_S = 60.0
_MAX_MESSAGE_BYTES = 16 << 20

#: Puts the pipes where Chromium looks for them, and leaves the network if the kernel lets it.
#: CLONE_NEWNET is 0x40000000 and CLONE_NEWUSER 0x10000000.
_LAUNCHER = """
import ctypes, fcntl, os, sys
read, write, isolate, *command = sys.argv[1:]
if isolate == "1":
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None)
    if uid == 0:
        libc.unshare(0x40000000)
    elif libc.unshare(0x50000000) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in (read, write))
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(command[0], command)
"""


class BrowserError(Exception):
    """The browser did not start, or died: no page is to blame."""


class CommandRefused(Exception):
    """The browser is well, but cannot do that, e.g. with a page that has gone elsewhere."""


class PageCrash(Exception):
    """The page's renderer died, of memory for instance."""


class PageFlood(Exception):
    """The page holds, prints or asks for more than anybody wants to look at."""


def find_browser(path: str = "") -> str:
    """The Chromium to run: ``path``, or the first known name on the PATH.

    Raises:
      UserError: there is none.
    """
    for name in (path,) if path else _NAMES:
        if found := shutil.which(name):
            return found
    raise UserError(
        f"no browser {path!r}" if path else "tasks of domain 'web' need Chromium; none was found",
        "install it with the system's package manager, e.g. apt-get install chromium",
    )


class Browser:
    """One Chromium process tree.  Lives on one event loop.

    Args:
      executable: from ``find_browser``.
      use_namespace: give it a network namespace of its own, where the kernel allows that.
    """

    def __init__(self, executable: str, use_namespace: bool = True):
        self._executable = executable
        self._use_namespace = use_namespace
        self._process: subprocess.Popen[bytes] | None = None
        self._profile = ""
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listeners: dict[str, Callable[[str, Mapping[str, Any]], None]] = {}
        self._transports: list[asyncio.BaseTransport] = []
        self._writer: asyncio.WriteTransport | None = None
        self._reading: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    async def start(self) -> None:
        """Starts the browser and waits until it answers.

        Raises:
          BrowserError: it does not.
        """
        self._profile = tempfile.mkdtemp(prefix="cosr-web-")
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        command = [self._executable, *_FLAGS, f"--user-data-dir={self._profile}/profile"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to run as root with its own sandbox
        command.append("about:blank")
        isolate = "1" if self._use_namespace else "0"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(to_read), str(from_write)]
        log = os.open(Path(self._profile, "log"), os.O_WRONLY | os.O_CREAT)
        try:
            self._process = subprocess.Popen(
                [*launcher, isolate, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(to_read, from_write),
                env={"HOME": self._profile, "PATH": os.defpath, "LANG": "C.UTF-8", "TZ": "UTC"},
                cwd=self._profile,
                start_new_session=True,  # so that the whole group can be killed
            )
        except OSError as error:
            for fd in (to_write, from_read):
                os.close(fd)
            raise BrowserError(f"browser did not start: {error}") from error
        finally:
            for fd in (to_read, from_write, log):
                os.close(fd)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MAX_MESSAGE_BYTES)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_read, "rb")
        )
        self._writer, _ = await loop.connect_write_pipe(
            asyncio.BaseProtocol, os.fdopen(to_write, "wb")
        )
        self._transports = [reading, self._writer]
        self._reading = asyncio.create_task(self._read(reader))
        try:
            async with asyncio.timeout(_START_S):
                await self.send("Browser.getVersion")
        except TimeoutError as error:
            raise BrowserError(f"browser did not answer within {_START_S:g} s") from error

    async def send(
        self, method: str, params: Mapping[str, Any] | None = None, session: str = ""
    ) -> dict[str, Any]:
        """One command and its result.

        Raises:
          BrowserError: the browser is gone.
          CommandRefused: it answered with an error.
          PageFlood: its answer is too large; the browser is of no more use.
        """
        if self._error or self._writer is None:
            raise self._error or BrowserError("browser is not running")
        number = next(self._ids)
        message = {"id": number, "method": method, "params": dict(params or {})}
        if session:
            message["sessionId"] = session
        future = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        try:
            self._writer.write(json.dumps(message).encode() + b"\0")
            reply = await future
        finally:
            self._replies.pop(number, None)
        if "error" in reply:
            raise CommandRefused(f"{method}: {reply['error'].get('message', reply['error'])}")
        return reply["result"]

    def listen(self, session: str, listener: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Calls ``listener(method, params)`` for events of ``session`` ("" for the browser's)."""
        self._listeners[session] = listener

    def forget(self, session: str) -> None:
        """Ends ``listen``."""
        self._listeners.pop(session, None)

    def cpu_seconds(self) -> float:
        """CPU time that the process tree has used so far, where /proc tells it."""
        if self._process is None:
            return 0.0
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:  # the process group
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def has_failed(self) -> bool:
        """Whether the browser is gone."""
        return self._error is not None

    async def close(self) -> None:
        """Kills every process of the browser and deletes the profile."""
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        for transport in self._transports:
            transport.close()
        self._transports, self._writer = [], None
        if self._process:
            # The leader is not reaped yet, so the group's number cannot be another's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            await _end_all(self._process.pid, self._profile)
            self._process = None
        if self._profile:
            shutil.rmtree(self._profile, ignore_errors=True)
            self._profile = ""

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = json.loads((await reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    future = self._replies.get(message["id"])
                    if future and not future.done():
                        future.set_result(message)
                elif listener := self._listeners.get(message.get("sessionId", "")):
                    listener(message["method"], message.get("params", {}))
        except asyncio.LimitOverrunError:
            self._fail(PageFlood(f"the page takes more than {_MAX_MESSAGE_BYTES >> 20} MiB"))
        except (asyncio.IncompleteReadError, ValueError, OSError) as e:
            self._fail(BrowserError(f"browser ended ({type(e).__name__}): {self._last_words()}"))

    def _last_words(self) -> str:
        try:
            return Path(self._profile, "log").read_text(errors="replace")[-500:].strip()
        except OSError:
            return ""

    def _fail(self, error: Exception) -> None:
        self._error = error
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)


async def _end_all(group: int, profile: str) -> None:
    """Waits until no process of a killed group is left, nor any other that names ``profile``.

    Chromium's crash handlers leave the group for sessions of their own, whatever the flags say.
    They end by themselves when the browser does, but later.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        others = _processes_naming(profile)
        for pid in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, 0)
            others.append(group)
        if not others:
            return
        await asyncio.sleep(0.01)


def _processes_naming(path: str) -> list[int]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(path) in command.read_bytes():
                found.append(int(command.parent.name))
    return found
