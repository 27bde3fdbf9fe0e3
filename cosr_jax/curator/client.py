"""The client of curator models: servers, limits and memory of the calls of a run.

A question goes to its role's endpoints in order of preference (``session``).  ``Client.ask_all``
gives a ``Reply`` or a ``CallError`` for each, and does so before the deadline, whatever the servers
do: they may be silent, trickle, cut bodies short or send garbage.  Nothing here judges an answer's
content beyond its presence; that is the parser's work, which can have a model asked again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.breaker import Breaker
from cosr_jax.curator.budget import Budget
from cosr_jax.curator.calls import (
    CallError,
    Question,
    Reply,
    outcome_from_dict,
    outcome_to_dict,
)
from cosr_jax.curator.endpoints import Abilities, Endpoint, parse_endpoints, parse_roles
from cosr_jax.curator.recordings import Archive
from cosr_jax.curator.session import Session
from cosr_jax.curator.tally import Tally
from cosr_jax.curator.wire import require_openai
from cosr_jax.types import UserError


class Clock(Protocol):
    """Time for waiting and for deadlines; tests bring one that does not wait."""

    def now(self) -> float:
        """Seconds, never going back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """What came of questions that nobody has asked ``Client.ask_all`` yet."""

    keys: Sequence[str]
    outcomes: Sequence[Reply | CallError] = ()
    failure: BaseException | None = None  # instead of outcomes


class Client:
    """Endpoints, limits and memory of the curator's model calls.

    Not thread-safe; one session at a time.  ``busy_s`` and ``waited_s`` are the seconds since its
    making that questions were under way, and those of them that somebody waited for.

    Args:
      config: where to ask, how patiently, and what it may cost.
      seed: of the jitter between retries.
      on_call: called with one JSON-serialisable record about each finished call, for a log.
      clock: time for waiting; requests themselves are limited by the machine's clock.

    Raises:
      UserError: the config names no endpoint, or contradicts itself; a key or the ``openai``
        package is missing, though a replay would do without.
    """

    def __init__(
        self,
        config: CuratorLlmConfig,
        *,
        seed: int = 0,
        on_call: Callable[[Mapping[str, Any]], None] | None = None,
        clock: Clock | None = None,
    ):
        self.config = config
        self.endpoints = parse_endpoints(config.endpoints)
        self.routes = parse_roles(config.roles, self.endpoints)
        if not self.endpoints:
            raise UserError(
                "config.curator.llm.endpoints: () names no server",
                "add one, e.g. 'gpt-oss http://127.0.0.1:8000/v1 model=curator'",
            )
        self.archive = Archive(config)
        if config.mode != "replay":  # now, rather than in the middle of a run
            require_openai()
            for endpoint in self.endpoints.values():
                endpoint.api_key()
        self.budget = Budget(config)
        self.breakers = {
            name: Breaker(config.breaker_failures, config.breaker_cooldown_s)
            for name in self.endpoints
        }
        self.abilities = {name: Abilities(e) for name, e in self.endpoints.items()}
        self.tally = Tally(on_call)
        self.clock = clock or SystemClock()
        self.rng = random.Random(seed)
        self.busy_s = self.waited_s = 0.0
        self._ahead: _Ahead | None = None

    def asked(self, question: Question) -> tuple[Endpoint, ...]:
        """The endpoints of a question, the preferred one first."""
        if not question.endpoints:
            return self.routes[question.request.role]
        return tuple(self.endpoints[name] for name in question.endpoints)

    def key(self, question: Question) -> str:
        """The name of a question and its answer on disk."""
        endpoints = self.asked(question)
        # Not where they are, so that a server may move; by name where several are to be told apart.
        models = [f"{e.name} {e.model}" if question.endpoints else e.model for e in endpoints]
        return question.request.key(models, self.config.temperature, self.config.top_p)

    def start_round(self, number: int) -> None:
        """Begins round ``number`` of the budget."""
        self.budget.start_round(number)

    def ask(self, question: Question) -> Reply:
        """Asks one question, from code that is not asynchronous.

        Raises:
          CallError: no endpoint gave an answer that was accepted.
          UserError: see ``ask_all``.
        """
        (answer,) = self.ask_all([question])
        if isinstance(answer, CallError):
            raise answer
        return answer

    def ask_all(self, questions: Sequence[Question]) -> list[Reply | CallError]:
        """Asks all questions at once; one reply or error for each, in order.

        Equal requests are asked once, and share what comes of it, unless the mode is live.  What
        ``asking`` has asked already is not asked again.

        Raises:
          UserError: a recording is missing or damaged, or cannot be written.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.keys == [self.key(question) for question in questions]:
            if ahead.failure is not None:
                raise ahead.failure
            return list(ahead.outcomes)
        with self._waiting():
            return _run(self._outcomes(questions))

    @contextlib.contextmanager
    def asking(self, questions: Sequence[Question]) -> Iterator[None]:
        """Asks all questions while the block runs; ``ask_all`` has what came of them.

        Nothing else of the client may be used in the block.  Its end waits for the last answer.
        What cannot be asked is ``ask_all``'s to raise; an exception in the block drops what is
        under way.
        """
        keys = [self.key(question) for question in questions]
        with _loop_in_a_thread() as loop:
            future = asyncio.run_coroutine_threadsafe(self._outcomes(questions), loop)
            yield
            with self._waiting():
                failure = future.exception()
        outcomes = future.result() if failure is None else []
        self._ahead = _Ahead(keys, outcomes, failure)

    async def _outcomes(self, questions: Sequence[Question]) -> list[Reply | CallError]:
        """As ``ask_all``."""
        names = [
            str(place) if self.config.mode == "live" else self.key(question)
            for place, question in enumerate(questions)
        ]
        distinct = dict(zip(reversed(names), reversed(questions), strict=True))  # the first stays

        async def one(session: Session, question: Question) -> Reply | CallError:
            try:
                return await session.ask(question)
            except CallError as error:
                return error

        began = time.monotonic()
        try:
            async with self.session() as session, asyncio.TaskGroup() as group:
                tasks = {
                    name: group.create_task(one(session, distinct[name]))
                    for name in dict.fromkeys(names)
                }
        except BaseExceptionGroup as failures:
            # One is enough to tell the user; the others were cancelled or are of its kind.
            raise failures.exceptions[0] from None
        finally:
            self.busy_s += time.monotonic() - began
        return [tasks[name].result() for name in names]

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Connections for the running event loop.

        Raises:
          UserError: a key or the ``openai`` package is missing.
        """
        session = Session(self)
        try:
            yield session
        finally:
            await session.close()

    def stats(self) -> dict[str, float]:
        """``Tally``'s counts, and the state of breakers and budget; for TensorBoard."""
        values = {name: float(count) for name, count in self.tally.counts.items()}
        values["damaged"] = self.archive.damaged
        values["unwritten"] = self.archive.unwritten
        now = self.clock.now()
        for name, breaker in self.breakers.items():
            values[f"breaker_open/{name}"] = float(breaker.state(now) != "closed")
        spent = self.budget.spent_in_run
        values |= {"spent/calls": spent.calls, "spent/tokens": spent.tokens}
        values["spent/dollars"] = spent.dollars
        return dict(sorted(values.items()))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        now = self.clock.now()
        return {
            "budget": self.budget.state_dict(),
            "archive": self.archive.state_dict(),
            "breakers": {name: b.state_dict(now) for name, b in self.breakers.items()},
            "abilities": {name: a.state_dict() for name, a in self.abilities.items()},
            "counts": dict(self.tally.counts),
            "ahead": self._ahead_to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values; endpoints that are no longer declared are forgotten."""
        now = self.clock.now()
        self.budget.load_state_dict(state["budget"])
        self.archive.load_state_dict(state["archive"])
        for name in self.endpoints:
            if name in state["breakers"]:
                self.breakers[name].load_state_dict(state["breakers"][name], now)
                self.abilities[name].load_state_dict(state["abilities"][name])
        self.tally.counts.clear()
        self.tally.counts.update(state["counts"])
        ahead = state.get("ahead")
        self._ahead = ahead and _Ahead(
            ahead["keys"], [outcome_from_dict(outcome) for outcome in ahead["outcomes"]]
        )

    def _ahead_to_dict(self) -> dict[str, Any] | None:
        """What was asked ahead; a failure is met again by asking again."""
        ahead = self._ahead
        if ahead is None or ahead.failure is not None:
            return None
        outcomes = [outcome_to_dict(outcome) for outcome in ahead.outcomes]
        return {"keys": list(ahead.keys), "outcomes": outcomes}


class _Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads that nobody waits for: one stuck in a DNS lookup must not hold a call."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def _run(work: Coroutine[Any, Any, list[Reply | CallError]]) -> list[Reply | CallError]:
    with asyncio.Runner() as runner:  # it turns an interrupt into a cancellation
        runner.get_loop().set_default_executor(_Threads())
        return runner.run(work)


@contextlib.contextmanager
def _loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs while the block does; what it has not done by then is cancelled."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        loop = runner.get_loop()
        loop.set_default_executor(_Threads())
        thread = threading.Thread(target=loop.run_forever, name="asking", daemon=True)
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
