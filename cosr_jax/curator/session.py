"""One batch of questions under way: the retry loop around requests, within all limits."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from cosr_jax.curator.backoff import backoff_s
from cosr_jax.curator.budget import Room
from cosr_jax.curator.calls import CallError, Charge, Question, Reply, Request
from cosr_jax.curator.endpoints import Endpoint
from cosr_jax.curator.quoting import defused
from cosr_jax.curator.wire import Connection, Failure, counted

if TYPE_CHECKING:
    from cosr_jax.curator.client import Client

_log = logging.getLogger(__name__)

#: Characters of a rejected answer that the model is shown when it is asked again.
_REJECTED_SHOWN = 8_000


@dataclasses.dataclass
class _Call:
    """One question under way."""

    started: float
    deadline: float
    attempts: int = 0
    spent: Charge = dataclasses.field(default_factory=Charge)
    trail: list[str] = dataclasses.field(default_factory=list)  # what happened, in order

    @property
    def seconds(self) -> float:
        return self.deadline - self.started


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
        started = self._client.clock.now()
        while True:
            try:
                return await self._ask(question, started)
            except CallError as error:
                shorter = question.shorter() if question.shorter else None
                if error.reason != "context_overflow" or shorter is None:
                    raise
                question = dataclasses.replace(shorter, endpoints=question.endpoints)
                self._client.tally.count("shortened")

    async def _ask(self, question: Question, started: float) -> Reply:
        client, request = self._client, question.request
        key = client.key(question)
        found = client.archive.find(key, request.role)
        if found is not None and isinstance(found.outcome, Reply) and question.accept:
            complaint = question.accept(found.outcome)
            if complaint is not None:  # it is parsed by other rules than when it was kept
                found = client.archive.rejected(found, complaint)
        if found is not None:
            outcome, is_charged, trail = found.outcome, found.is_charged, ["kept"]
            if is_charged:
                client.budget.charge(outcome.spent)
        else:
            seconds = min(self._config.deadline_s, question.deadline_s)
            call = _Call(started, deadline=started + seconds)
            outcome, is_charged, trail = await self._outcome(question, call), True, call.trail
            client.archive.keep(key, request, outcome)
        client.tally.finish(key, request, outcome, trail, is_charged)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome

    async def _outcome(self, question: Question, call: _Call) -> Reply | CallError:
        try:
            return await self._from_any(question, call)
        except CallError as error:
            return error

    async def _from_any(self, question: Question, call: _Call) -> Reply:
        """The answer of the first endpoint that gives one."""
        failures: list[tuple[str, Failure]] = []
        for endpoint in self._client.asked(question):
            if failures:
                self._client.tally.count(f"failover/{endpoint.name}")
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
            latency_s=self._client.clock.now() - call.started,
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
        met: Failure | None = None  # what the last request ended in
        is_lengthened = False
        while True:
            tries += 1
            try:
                body = client.abilities[endpoint.name].body(
                    asked,
                    temperature=self._config.temperature,
                    top_p=self._config.top_p,
                )
                reply = await self._attempt(endpoint, asked, body, call)
                if _is_cut(reply) and not is_lengthened and tries < self._config.max_attempts:
                    client.tally.count("lengthened")
                    is_lengthened, cut, asked = True, reply, asked.lengthened()
                    continue
                _check_presence(reply)
            except Failure as failure:
                self._note(endpoint, failure, call)
                if cut is not None and _has_text(cut.content):
                    reply = self._with_totals(cut, call)
                elif self._adapts(endpoint, failure, asked, body):
                    tries -= 1
                    continue
                else:
                    if met is not None and failure.reason == "breaker_open":
                        raise met from None  # it is why the breaker opened meanwhile
                    met = failure
                    await self._wait(failure, tries, call)
                    continue
            cut = None
            complaint = question.accept(reply) if question.accept else None
            if complaint is None:
                return reply
            client.tally.count(f"rejected/{complaint.kind}")
            call.trail.append(f"{endpoint.name}: rejected, {complaint.kind}")
            is_last = reasks == self._config.max_reasks or tries >= self._config.max_attempts
            if is_last or reply.finish_reason == "length":  # cut again if asked again
                raise Failure(complaint.kind, "rejected", complaint.detail, is_retryable=False)
            reasks += 1
            answer = defused((reply.content or reply.refusal or "")[:_REJECTED_SHOWN])
            asked = asked.reasked(answer, complaint.detail)

    def _note(self, endpoint: Endpoint, failure: Failure, call: _Call) -> None:
        self._client.tally.count(f"attempts_failed/{failure.reason}")
        call.trail.append(f"{endpoint.name}: {failure}")

    def _adapts(
        self, endpoint: Endpoint, failure: Failure, asked: Request, body: Mapping[str, Any]
    ) -> bool:
        """Whether the server told what it cannot do, so that the next request is another."""
        count, abilities = self._client.tally.count, self._client.abilities[endpoint.name]
        if failure.context:
            if abilities.learn_context(failure.context):
                count("downgraded/context")
                _log.warning("%s has less context than config says: %s", endpoint.name, failure)
            return abilities.room_for_answer(asked) < _answer_tokens(body)
        if not failure.message and not failure.parameter:
            return False
        name = abilities.refused(body, failure.parameter, failure.message)
        if name and abilities.give_up(name):
            count(f"downgraded/{name}")
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
        wait = max(backoff_s(tries - 1, client.rng), failure.retry_after_s or 0.0)
        if client.clock.now() + wait >= call.deadline:
            raise failure
        await client.clock.sleep(wait)

    async def _attempt(
        self, endpoint: Endpoint, asked: Request, body: Mapping[str, Any], call: _Call
    ) -> Reply:
        """One HTTP request, within concurrency, budget and breaker.

        Raises:
          Failure: it was not sent, or brought no completion.
        """
        if _answer_tokens(body) == 0:
            raise _ours("context_overflow", f"a prompt of {asked.prompt_tokens} tokens or so")
        if self._client.clock.now() >= call.deadline:
            raise _too_late(call)
        await self._within(call, self._slots.acquire())
        try:
            return await self._send(endpoint, asked, body, call)
        finally:
            self._slots.release()

    async def _send(
        self, endpoint: Endpoint, asked: Request, body: Mapping[str, Any], call: _Call
    ) -> Reply:
        client, clock = self._client, self._client.clock
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
        client.tally.count("attempts")
        sent = clock.now()
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
            if failure.reason == "deadline" and clock.now() - sent < call.seconds / 2:
                is_healthy = None  # it was asked late
            if failure.reason in ("timeout", "deadline"):
                charge = endpoint.cost(asked.prompt_tokens, 0)  # it has read the prompt by then
            raise
        finally:
            self._settle(reserved, charge, call)
            if breaker.settle(permit, is_healthy, clock.now()):
                client.tally.count(f"breaker_opened/{endpoint.name}")
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
        latency_s = self._client.clock.now() - call.started
        return dataclasses.replace(
            reply, spent=call.spent, latency_s=latency_s, attempts=call.attempts
        )

    async def _reserve(self, endpoint: Endpoint, asked: Request, call: _Call) -> Charge:
        """Sets the most that a request can cost aside; waits while others may yet cost less."""
        budget = self._client.budget
        answer = self._client.abilities[endpoint.name].room_for_answer(asked)
        worst = endpoint.cost(asked.most_prompt_tokens, answer)
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
        left = call.deadline - self._client.clock.now()
        try:
            async with asyncio.timeout(min(left, at_most)):
                return await work
        except TimeoutError:
            if left <= at_most:
                raise _too_late(call) from None
            raise Failure("transport", "timeout", f"no answer in {at_most:g} s") from None


def _too_late(call: _Call) -> Failure:
    return Failure("transport", "deadline", f"{call.seconds:g} s are over", is_retryable=False)


def _ours(reason: str, detail: str) -> Failure:
    """A request that was not sent."""
    return Failure("transport", reason, detail, is_retryable=False, is_sick=False)


def _answer_tokens(body: Mapping[str, Any]) -> int:
    return body.get("max_tokens", body.get("max_completion_tokens"))


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
