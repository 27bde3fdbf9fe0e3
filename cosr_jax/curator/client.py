"""The client of curator models: one retry loop around OpenAI-compatible servers, within limits.

A question goes to its role's endpoints in order of preference.  ``Session.ask`` either returns a
``Reply`` or raises a ``CallError``, and does so before the deadline, whatever the servers do: they
may be silent, trickle, cut bodies short or send garbage.  Nothing here judges an answer's content
beyond its presence; that is the parser's work, which can have a model asked again (``accept``).
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cosr_jax.curator.backoff import backoff_s
from cosr_jax.curator.breaker import Breaker
from cosr_jax.curator.budget import Budget, Room
from cosr_jax.curator.calls import CallError, Charge, Complaint, Reply, Request
from cosr_jax.curator.endpoints import Abilities, Endpoint, parse_endpoints, parse_roles
from cosr_jax.curator.llm_config import CuratorLlmConfig
from cosr_jax.curator.quoting import defused
from cosr_jax.curator.recordings import Recordings
from cosr_jax.curator.wire import Connection, Failure, counted
from cosr_jax.types import UserError

_log = logging.getLogger(__name__)

#: Characters of a rejected answer that the model is shown when it is asked again.
_REJECTED_SHOWN = 8_000


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
class Question:
    """A request, and what to do about answers and prompts that do not fit.

    ``accept`` looks at an answer and says what is wrong with it, or None; it runs between the
    arrivals of other answers, so it should take no longer than parsing does.
    """

    request: Request
    accept: Callable[[Reply], Complaint | None] | None = None
    #: The same question with fewer examples, for a prompt that is too long for the model; None
    #: once no more can be left out.
    shorter: Callable[[], Question | None] | None = None


@dataclasses.dataclass
class _Call:
    """One question under way."""

    started: float
    deadline: float
    attempts: int = 0
    spent: Charge = dataclasses.field(default_factory=Charge)
    trail: list[str] = dataclasses.field(default_factory=list)  # what happened, in order


class Client:
    """Endpoints, limits and memory of the curator's model calls.

    Not thread-safe; one session at a time.

    Args:
      config: where to ask, how patiently, and what it may cost.
      seed: of the jitter between retries.
      on_call: called with one JSON-serialisable record about each finished call, for a log.
      clock: time for waiting; requests themselves are limited by the machine's clock.

    Raises:
      UserError: the config names no endpoint, or contradicts itself.
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
        if config.mode != "live" and not config.folder:
            raise UserError(
                f"config.curator.llm.folder: '' with mode {config.mode!r}",
                "name the folder of the recorded answers",
            )
        self.budget = Budget(config)
        self.breakers = {
            name: Breaker(config.breaker_failures, config.breaker_cooldown_s)
            for name in self.endpoints
        }
        self._abilities = {name: Abilities() for name in self.endpoints}
        self._recordings = Recordings(Path(config.folder)) if config.mode != "live" else None
        self._recorded_failures: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._clock = clock or SystemClock()
        self._rng = random.Random(seed)
        self._on_call = on_call

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

        Raises:
          UserError: a key or the ``openai`` package is missing, a recording is missing or damaged,
            or cannot be written.
        """

        async def one(session: Session, question: Question) -> Reply | CallError:
            try:
                return await session.ask(question)
            except CallError as error:
                return error

        async def everything() -> list[Reply | CallError]:
            async with self.session() as session, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(session, q)) for q in questions]
            return [task.result() for task in tasks]

        try:
            return _run(everything())
        except BaseExceptionGroup as group:
            # One is enough to tell the user; the others were cancelled or are of its kind.
            raise group.exceptions[0] from None

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
        """Counts since the run began, by slashed names; for TensorBoard."""
        values = {name: float(count) for name, count in self._counts.items()}
        if self._recordings is not None:
            values["cache/damaged"] = float(self._recordings.damaged)
        now = self._clock.now()
        for name, breaker in self.breakers.items():
            values[f"breaker_open/{name}"] = float(breaker.state(now) != "closed")
        spent = self.budget.spent_in_run
        values |= {"spent/calls": spent.calls, "spent/tokens": spent.tokens}
        values["spent/dollars"] = spent.dollars
        return dict(sorted(values.items()))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, as JSON-serialisable values."""
        now = self._clock.now()
        return {
            "budget": self.budget.state_dict(),
            "breakers": {name: b.state_dict(now) for name, b in self.breakers.items()},
            "given_up": {name: list(a.given_up) for name, a in self._abilities.items()},
            "recorded_failures": dict(self._recorded_failures),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values; endpoints that are no longer declared are forgotten."""
        now = self._clock.now()
        self.budget.load_state_dict(state["budget"])
        for name in self.endpoints:
            if name in state["breakers"]:
                self.breakers[name].load_state_dict(state["breakers"][name], now)
                self._abilities[name].given_up = list(state["given_up"][name])
        self._recorded_failures = collections.Counter(state["recorded_failures"])
        self._counts = collections.Counter(state["counts"])

    # What follows is for Session.

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts[name] += amount  # type: ignore[assignment]

    def _key(self, request: Request) -> str:
        models = [endpoint.model for endpoint in self.routes[request.role]]
        return request.key(models, self.config.temperature, self.config.top_p)

    def _recorded(self, request: Request) -> Reply | CallError | None:
        """The outcome of the same question on disk, if the mode wants it."""
        if self._recordings is None:
            return None
        key, n = self._key(request), self._recorded_failures[self._key(request)]
        if self.config.mode == "replay":
            payload: dict[str, Any] | None = self._recordings.replay(key, n, request.role)
        else:
            payload = self._recordings.read(key, n)
        if payload is None:
            return None
        outcome: Reply | CallError
        if "error" in payload:
            outcome = CallError.from_dict(payload["error"])
            self._recorded_failures[key] += 1
        else:
            outcome = dataclasses.replace(Reply.from_dict(payload["reply"]), from_cache=True)
        if self.config.mode != "cache":
            # A recorded run costs what it cost, so that it takes the same turns when replayed.
            self.budget.charge(outcome.spent)
        return outcome

    def _record(self, request: Request, outcome: Reply | CallError) -> None:
        """Keeps an outcome: good ones in the cache, all of them in a recording.

        Raises:
          UserError: a recording cannot be written.
        """
        is_error = isinstance(outcome, CallError)
        if self._recordings is None or (self.config.mode == "cache" and is_error):
            return
        key = self._key(request)
        name = "error" if is_error else "reply"
        payload = {"request": request.to_dict(), name: outcome.to_dict()}
        try:
            self._recordings.write(key, self._recorded_failures[key], payload)
        except OSError as error:
            if self.config.mode == "record":
                raise UserError(
                    f"config.curator.llm.folder: {self.config.folder}: {error}",
                    "make room, or record to another folder",
                ) from error
            self._count("cache/unwritten")
            _log.warning("an answer could not be cached: %s", error)
        if is_error:
            self._recorded_failures[key] += 1

    def _finish(self, request: Request, outcome: Reply | CallError, trail: list[str]) -> None:
        """Counts and logs a finished call."""
        role, is_error = request.role, isinstance(outcome, CallError)
        self._count(f"calls/{role}")
        if isinstance(outcome, CallError):
            self._count(f"failed/{outcome.reason}")
        from_cache = isinstance(outcome, Reply) and outcome.from_cache
        if not (from_cache and self.config.mode == "cache"):
            spent = outcome.spent
            self._count(f"tokens/{role}/prompt", spent.prompt_tokens)
            self._count(f"tokens/{role}/completion", spent.completion_tokens)
            self._count(f"latency_s/{role}", outcome.latency_s)
        if isinstance(outcome, Reply):
            self._count(f"tokens/{role}/reasoning", outcome.usage.reasoning_tokens)
            self._count("usage_estimated", outcome.usage.is_estimated)
        record = outcome.to_dict()
        for text in ("content", "reasoning", "refusal"):
            record.pop(text, None)
        level = logging.WARNING if is_error else logging.INFO
        _log.log(level, "%s: %s after %s", role, record.get("reason", "answered"), trail)
        if self._on_call is not None:
            asked = {"role": role, "key": self._key(request), "schema": request.schema_hash}
            dollars = outcome.spent.dollars
            self._on_call({**asked, **record, "dollars": dollars, "trail": trail})


class Session:
    """A client's open connections; made by ``Client.session``."""

    def __init__(self, client: Client):
        self._client, self._config = client, client.config
        self._slots = asyncio.Semaphore(client.config.concurrency)
        self._settled = asyncio.Event()
        is_replay = client.config.mode == "replay"
        self._connections = (
            {} if is_replay else {n: Connection(e) for n, e in client.endpoints.items()}
        )

    async def close(self) -> None:
        """Drops the connections."""
        for connection in self._connections.values():
            await connection.close()

    async def ask(self, question: Question) -> Reply:
        """Asks one question.

        Raises:
          CallError: no endpoint gave an answer that was accepted before the deadline.
          UserError: a recording is missing, damaged, or cannot be written.
        """
        while True:
            try:
                return await self._ask(question)
            except CallError as error:
                shorter = question.shorter() if question.shorter else None
                if error.reason != "context_overflow" or shorter is None:
                    raise
                question = shorter
                self._client._count("shortened")

    async def _ask(self, question: Question) -> Reply:
        client, request = self._client, question.request
        recorded = client._recorded(request)
        if isinstance(recorded, CallError):
            client._finish(request, recorded, ["recorded"])
            raise recorded
        if recorded is not None:
            complaint = question.accept(recorded) if question.accept else None
            if complaint is None:
                client._count("cache/hits")
                client._finish(request, recorded, ["recorded"])
                return recorded
            if self._config.mode != "cache":
                # Parsed by other rules than when it was recorded.
                raise CallError(complaint.kind, "rejected", complaint.detail)
        now = client._clock.now()
        call = _Call(started=now, deadline=now + self._config.deadline_s)
        outcome: Reply | CallError
        try:
            outcome = await self._from_any(question, call)
        except CallError as error:
            outcome = error
        client._record(request, outcome)
        client._finish(request, outcome, call.trail)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome

    async def _from_any(self, question: Question, call: _Call) -> Reply:
        """The answer of the first endpoint that gives one."""
        failures: list[tuple[str, Failure]] = []
        for endpoint in self._client.routes[question.request.role]:
            if failures:
                self._client._count(f"failover/{endpoint.name}")
            try:
                return await self._from(endpoint, question, call)
            except Failure as failure:
                failures.append((endpoint.name, failure))
        last = failures[-1][1]
        overflows = [f for _, f in failures if f.reason == "context_overflow"]
        last = (overflows or [last])[0]  # the asker can do something about an overflow
        raise CallError(
            last.kind,
            last.reason,
            "; ".join(f"{name}: {failure}" for name, failure in failures),
            spent=call.spent,
            latency_s=self._client._clock.now() - call.started,
            attempts=call.attempts,
        ) from last

    async def _from(self, endpoint: Endpoint, question: Question, call: _Call) -> Reply:
        """One endpoint's answer: the retry loop.

        Raises:
          Failure: it gave none.
        """
        client, asked = self._client, question.request
        tries = reasks = 0
        cut: Reply | None = None  # an answer that ended with its token budget
        is_lengthened = False
        while True:
            tries += 1
            try:
                body = client._abilities[endpoint.name].body(
                    endpoint,
                    asked,
                    temperature=self._config.temperature,
                    top_p=self._config.top_p,
                )
                reply = await self._attempt(endpoint, asked, body, call)
                if _is_cut(reply) and not is_lengthened and tries < self._config.max_attempts:
                    client._count("lengthened")
                    is_lengthened, cut, asked = True, reply, asked.lengthened()
                    continue
                _check_presence(reply)
            except Failure as failure:
                self._note(endpoint, failure, call)
                if cut is not None and _has_text(cut.content):
                    reply = self._with_totals(cut, call)
                elif self._gives_up_parameter(endpoint, failure, body):
                    tries -= 1
                    continue
                else:
                    await self._wait(failure, tries, call)
                    continue
            cut = None
            complaint = question.accept(reply) if question.accept else None
            if complaint is None:
                return reply
            client._count(f"reasked/{complaint.kind}")
            call.trail.append(f"{endpoint.name}: rejected, {complaint.kind}")
            is_last = reasks == self._config.max_reasks or tries >= self._config.max_attempts
            if is_last or reply.finish_reason == "length":  # cut again if asked again
                raise Failure(complaint.kind, "rejected", complaint.detail, is_retryable=False)
            reasks += 1
            answer = defused((reply.content or reply.refusal or "")[:_REJECTED_SHOWN])
            asked = asked.reasked(answer, complaint.detail)

    def _note(self, endpoint: Endpoint, failure: Failure, call: _Call) -> None:
        self._client._count(f"attempts_failed/{failure.reason}")
        call.trail.append(f"{endpoint.name}: {failure}")

    def _gives_up_parameter(
        self, endpoint: Endpoint, failure: Failure, body: Mapping[str, Any]
    ) -> bool:
        """Whether a parameter was to blame, which is not sent from now on."""
        if not failure.message and not failure.parameter:
            return False
        abilities = self._client._abilities[endpoint.name]
        name = abilities.refused(body, failure.parameter, failure.message)
        if name and abilities.give_up(name):
            self._client._count(f"downgraded/{name}")
            _log.warning("%s refuses %s: %s", endpoint.name, name, failure)
        return name != ""

    async def _wait(self, failure: Failure, tries: int, call: _Call) -> None:
        """Waits before the next try.

        Raises:
          Failure: the given one, if there is to be no next try.
        """
        if not failure.is_retryable or tries >= self._config.max_attempts:
            raise failure
        client = self._client
        wait = max(backoff_s(tries - 1, client._rng), failure.retry_after_s or 0.0)
        if client._clock.now() + wait >= call.deadline:
            raise failure
        await client._clock.sleep(wait)

    async def _attempt(
        self, endpoint: Endpoint, asked: Request, body: Mapping[str, Any], call: _Call
    ) -> Reply:
        """One HTTP request, within concurrency, budget and breaker.

        Raises:
          Failure: it was not sent, or brought no completion.
        """
        if body.get("max_tokens", body.get("max_completion_tokens")) == 0:
            raise _ours("context_overflow", f"a prompt of {asked.prompt_tokens} tokens or so")
        await self._within(call, self._slots.acquire())
        try:
            return await self._send(endpoint, asked, body, call)
        finally:
            self._slots.release()

    async def _send(
        self, endpoint: Endpoint, asked: Request, body: Mapping[str, Any], call: _Call
    ) -> Reply:
        client, clock = self._client, self._client._clock
        breaker = client.breakers[endpoint.name]
        reserved = await self._reserve(endpoint, asked, call)
        try:
            while (permit := breaker.admit(clock.now())) is None and breaker.is_probing:
                await self._within(call, self._settled.wait())  # the probe speaks for all
            if permit is None:
                raise _ours("breaker_open", "the server failed too often")
        except BaseException:
            self._settle(reserved, Charge(), call)
            raise
        call.attempts += 1
        client._count("attempts")
        is_healthy: bool | None = None
        charge = Charge(calls=1)
        try:
            answer = await self._within(
                call,
                self._connections[endpoint.name].send(body),
                at_most=self._config.timeout_s,
            )
            usage, is_healthy = counted(answer, asked.prompt_tokens), True
            charge = endpoint.charge(usage)
        except Failure as failure:
            is_healthy = not failure.is_sick
            if failure.reason in ("timeout", "deadline"):
                charge = endpoint.cost(asked.prompt_tokens, 0)  # it has read the prompt by then
            raise
        finally:
            self._settle(reserved, charge, call)
            if breaker.settle(permit, is_healthy, clock.now()):
                client._count(f"breaker_opened/{endpoint.name}")
                _log.warning("%s failed too often and is left alone", endpoint.name)
        reply = Reply(
            content=answer.content,
            reasoning=answer.reasoning,
            refusal=answer.refusal,
            finish_reason=answer.finish_reason,
            usage=usage,
            spent=Charge(),
            model=answer.model or endpoint.model,
            endpoint=endpoint.name,
            latency_s=0.0,
            attempts=0,
        )
        call.trail.append(f"{endpoint.name}: {answer.finish_reason}")
        return self._with_totals(reply, call)

    def _with_totals(self, reply: Reply, call: _Call) -> Reply:
        latency_s = self._client._clock.now() - call.started
        return dataclasses.replace(
            reply, spent=call.spent, latency_s=latency_s, attempts=call.attempts
        )

    async def _reserve(self, endpoint: Endpoint, asked: Request, call: _Call) -> Charge:
        """Sets the most that a request can cost aside; waits while others may yet cost less."""
        budget = self._client.budget
        worst = endpoint.cost(asked.most_prompt_tokens, endpoint.room_for_answer(asked))
        while True:
            room, limit = budget.room(worst)
            if room is Room.YES:
                budget.reserve(worst)
                return worst
            if room is Room.NO:
                raise _ours(f"budget_{limit}", f"up to {worst.tokens} tokens do not fit any more")
            await self._within(call, self._settled.wait())

    def _settle(self, reserved: Charge, actual: Charge, call: _Call) -> None:
        self._client.budget.settle(reserved, actual)
        call.spent += actual
        self._settled.set()
        self._settled = asyncio.Event()

    async def _within(
        self, call: _Call, work: Coroutine[Any, Any, Any], at_most: float = float("inf")
    ) -> Any:
        """Awaits ``work`` until the call's deadline, or for ``at_most`` seconds.

        Raises:
          Failure: it took longer.
        """
        left = call.deadline - self._client._clock.now()
        try:
            async with asyncio.timeout(min(left, at_most)):
                return await work
        except TimeoutError:
            if left <= at_most:
                seconds = self._config.deadline_s
                raise _ours("deadline", f"{seconds:g} s are over", is_sick=True) from None
            raise Failure("transport", "timeout", f"no answer in {at_most:g} s") from None


def _ours(reason: str, detail: str, is_sick: bool = False) -> Failure:
    """A request given up on this side of the line."""
    return Failure("transport", reason, detail, is_retryable=False, is_sick=is_sick)


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _is_cut(reply: Reply) -> bool:
    """Whether the token budget ended before the answer did.

    A grammar lets a model append blanks for ever, so a whole JSON value may be there all the same.
    """
    if reply.finish_reason != "length" or reply.refusal:
        return False
    try:
        json.loads(reply.content or "")
    except (ValueError, RecursionError):
        return True
    return False


def _check_presence(reply: Reply) -> None:
    """Raises a Failure for a completion without an answer: models slip, so it is worth a retry."""
    if _has_text(reply.content) or _has_text(reply.refusal):
        return
    is_cut = reply.finish_reason == "length"
    kind = "truncated" if is_cut else "no_final" if _has_text(reply.reasoning) else "empty"
    # A budget that was doubled and spent again would be spent a third time.
    raise Failure(
        kind, kind, f"finish_reason {reply.finish_reason}", is_retryable=not is_cut, is_sick=False
    )


class _Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads that nobody waits for: one stuck in a DNS lookup must not hold a call."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def _run(work: Coroutine[Any, Any, list[Reply | CallError]]) -> list[Reply | CallError]:
    with asyncio.Runner() as runner:  # it turns an interrupt into a cancellation
        runner.get_loop().set_default_executor(_Threads())
        return runner.run(work)
