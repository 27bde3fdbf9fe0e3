"""A client of a loopback server, and a clock that does not wait."""

from __future__ import annotations

import time
from typing import Any

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.calls import CallError, Complaint, Message, Question, Reply, Request
from cosr_jax.curator.client import Client

REQUEST = Request(
    "analyst", (Message("system", "Diagnose."), Message("user", "{}")), {"type": "object"}
)


class SkippingClock:
    """The machine's clock, except that waiting is skipped; ``waits`` lists what was asked for."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return time.monotonic() + sum(self.waits)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def make_client(*urls: str, **settings: Any) -> Client:
    """A client whose endpoints a, b, ... are at ``urls``, with options after a blank if any."""
    endpoints = tuple(f"{name} {url}" for name, url in zip("abcd", urls, strict=False))
    arguments = {k: settings.pop(k) for k in ("on_call", "seed", "clock") if k in settings}
    config = CuratorLlmConfig(endpoints=endpoints, **settings)
    return Client(config, **{"clock": SkippingClock(), **arguments})


def outcome(client: Client, request: Request = REQUEST, **question: Any) -> Reply | CallError:
    """What becomes of one question."""
    return client.ask_all([Question(request, **question)])[0]


def must_be_long(reply: Reply) -> Complaint | None:
    """An acceptance rule for tests."""
    return None if len(reply.content or "") > 3 else Complaint("schema", "it is too short")
