"""The local front of the judges: routes by domain, bounds what waits, retries what went wrong.

Everything here runs on one event loop.  ``pool.VerifierPool`` offers the same to synchronous code.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cosr_jax.config import VerifierConfig
from cosr_jax.types import (
    CATEGORIES,
    CodeChecks,
    Completion,
    Outcome,
    Task,
    UserError,
    Verdict,
)
from cosr_jax.verifiers.dispatch import Workers
from cosr_jax.verifiers.judges import Judge, Limits

_LATENCIES_KEPT = 10_000
_ATTEMPTS = 2

_log = logging.getLogger(__name__)

#: Builds the judge of a domain; called when its first case arrives.
Factory = Callable[[VerifierConfig, Workers], Judge]


def _math(config: VerifierConfig, workers: Workers) -> Judge:
    from cosr_jax.verifiers.maths import MathJudge

    return MathJudge(config.accept, workers)


def _code(config: VerifierConfig, workers: Workers) -> Judge:
    from cosr_jax.verifiers.code import CodeJudge

    return CodeJudge(config)


def _proof(config: VerifierConfig, workers: Workers) -> Judge:
    from cosr_jax.verifiers.proof import ProofJudge

    return ProofJudge(workers)


def _web(config: VerifierConfig, workers: Workers) -> Judge:
    from cosr_jax.verifiers.web import WebJudge

    return WebJudge(max_pages=config.workers)


def _gym(config: VerifierConfig, workers: Workers) -> Judge:
    from cosr_jax.verifiers.gym import GymJudge

    return GymJudge(workers)


FACTORIES: Mapping[str, Factory] = {
    "math": _math,
    "code": _code,
    "proof": _proof,
    "web": _web,
    "gym": _gym,
}


class Front(Protocol):
    """Judges one case at a time; many calls may be under way.  Local and remote ones exist."""

    async def start(self) -> None:
        """Makes ready.

        Raises:
          UserError: the config asks for what is not there.
        """

    async def judge(
        self, task: Task, completion: Completion, limits: Limits | None = None
    ) -> Verdict:
        """The verdict; ERROR only after a second attempt.

        Raises:
          UserError: nobody here can judge the task's domain.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """Figures since the start."""
        ...

    async def close(self) -> None:
        """Ends every process."""


def config_limits(config: VerifierConfig) -> Limits:
    """The limits of a case that brings none."""
    return Limits(config.wall_s, config.memory_mb, config.output_kb, config.file_mb)


def case_deadline_s(config: VerifierConfig, task: Task, limits: Limits) -> float:
    """Seconds after which a judge must be hung: no case may take as long."""
    parts = len(task.checks.io) if isinstance(task.checks, CodeChecks) else 0
    return config.deadline_s + 2 * limits.wall_s * max(1, parts)


class Tally:
    """Counts verdicts, and how long they took."""

    def __init__(self) -> None:
        self.retries = 0
        self.waiting = 0
        self.peak = 0
        self._verdicts: dict[str, collections.Counter[str]] = {}
        self._seconds: collections.deque[float] = collections.deque(maxlen=_LATENCIES_KEPT)

    def wait(self) -> None:
        """Counts a case that came in."""
        self.waiting += 1
        self.peak = max(self.peak, self.waiting)

    def count(self, domain: str, verdict: Verdict, seconds: float) -> None:
        """Counts a case that goes out, after ``seconds`` of judging."""
        name = "error" if verdict.outcome is Outcome.ERROR else verdict.category or "pass"
        self._verdicts.setdefault(domain, collections.Counter())[name] += 1
        self._seconds.append(seconds)

    def stats(self) -> dict[str, Any]:
        """Verdicts by domain and category ("pass", "error", or a failure category), all together
        and by domain; retries; errors; cases inside now and at most; median and 95th percentile of
        the time from a case's turn to its verdict, in seconds.
        """
        total = sum(self._verdicts.values(), collections.Counter[str]())
        ordered = sorted(self._seconds)
        return {
            "verdicts": dict(total),
            "by_domain": {domain: dict(counts) for domain, counts in self._verdicts.items()},
            "retries": self.retries,
            "errors": total["error"],
            "queue": self.waiting,
            "queue_peak": self.peak,
            "latency_p50_s": statistics.median(ordered) if ordered else 0.0,
            "latency_p95_s": ordered[int(0.95 * (len(ordered) - 1))] if ordered else 0.0,
        }


class LocalFront:
    """Implements ``Front`` with judges of this process.

    Args:
      config: workers, limits and queue.
      factories: what builds the judge of a domain.
      workers: killable processes for the judges that need them; closed by ``close``.
    """

    def __init__(
        self,
        config: VerifierConfig,
        factories: Mapping[str, Factory] = FACTORIES,
        workers: Workers | None = None,
    ):
        self._config = config
        self._factories = factories
        self._workers = workers or Workers(config.workers, config.recycle_after)
        self._limits = config_limits(config)
        self._lanes: dict[str, _Lane] = {}
        self._tally = Tally()

    async def start(self) -> None:
        """A domain's judge starts with its first case, but a layer that was asked for by name must
        be there at once.

        Raises:
          UserError: it is not.
        """
        if self._config.layer != "auto" and "code" in self._factories:
            await self._lane("code").judge()

    def is_full(self, domain: str) -> bool:
        """Whether another case of ``domain`` would have to wait to be let in."""
        return self._lane(domain).room.locked()

    async def judge(
        self, task: Task, completion: Completion, limits: Limits | None = None
    ) -> Verdict:
        """See ``Front``.  Waits while ``config.queue`` cases of the domain are inside."""
        lane = self._lane(task.domain)
        tally = self._tally
        async with lane.room:
            tally.wait()
            try:
                for attempt in range(_ATTEMPTS):
                    async with lane.slots:
                        began = time.perf_counter()
                        verdict = await self._attempt(lane, task, completion, limits)
                        seconds = time.perf_counter() - began
                    if verdict.outcome is not Outcome.ERROR:
                        break
                    _log.info("could not judge a %s case: %s", task.domain, verdict.detail)
                    tally.retries += attempt == 0
                tally.count(task.domain, verdict, seconds)
                return verdict
            finally:
                tally.waiting -= 1

    def stats(self) -> dict[str, Any]:
        """``Tally.stats``, and workers restarted."""
        return {**self._tally.stats(), "restarts": self._workers.restarts}

    async def close(self) -> None:
        """Ends the judges and their workers."""
        lanes = [lane.close() for lane in self._lanes.values()]
        await asyncio.gather(*lanes, self._workers.close())

    def _lane(self, domain: str) -> _Lane:
        if domain not in self._lanes:
            if domain not in self._factories:
                raise UserError(
                    f"domain {domain!r} has no judge",
                    f"tasks are of {', '.join(self._factories)}",
                )
            make = functools.partial(self._factories[domain], self._config, self._workers)
            self._lanes[domain] = _Lane(make, self._config.queue, self._config.workers)
        return self._lanes[domain]

    async def _attempt(
        self, lane: _Lane, task: Task, completion: Completion, limits: Limits | None
    ) -> Verdict:
        limits = limits or self._limits
        deadline_s = case_deadline_s(self._config, task, limits)
        try:
            async with asyncio.timeout(deadline_s):
                judge = await lane.judge()
                verdict = await judge.judge(task, completion, limits)
            return self._checked(verdict)
        except UserError:
            raise
        except TimeoutError:
            detail = f"no verdict within {deadline_s:g} s"
        except Exception as error:
            _log.exception("the judge of %s failed", task.domain)
            detail = f"{type(error).__name__}: {error}"
        return Verdict(Outcome.ERROR, 0.0, detail=detail)

    def _checked(self, verdict: Verdict) -> Verdict:
        """``verdict``, with a reward as configured.

        Raises:
          ValueError: it is none that a judge may give.
        """
        if verdict.outcome is Outcome.ERROR:
            return verdict
        has_passed = verdict.outcome is Outcome.PASS
        if verdict.category not in (("",) if has_passed else CATEGORIES):
            raise ValueError(f"{verdict.outcome.value} with category {verdict.category!r}")
        if not has_passed and not self._config.partial_credit:
            # Nothing is worth nothing whatever anyone thinks of it.
            return dataclasses.replace(verdict, reward=0.0, is_subjective=False)
        # An opinion may take something off a pass; nothing makes a failure worth a pass.
        is_right = verdict.reward == 1.0 if has_passed else 0.0 <= verdict.reward < 1.0
        if not is_right and not (verdict.is_subjective and 0.0 <= verdict.reward < 1.0):
            raise ValueError(f"{verdict.outcome.value} with reward {verdict.reward!r}")
        return verdict


class _Lane:
    """One domain: its judge, room for its cases, and slots for those under way.

    Each domain has its own, so that a slow one holds up nobody else.
    """

    def __init__(self, make: Callable[[], Judge], room: int, slots: int):
        self.room = asyncio.Semaphore(room)
        self.slots = asyncio.Semaphore(slots)
        self._make = make
        self._start: asyncio.Task[Judge] | None = None

    async def judge(self) -> Judge:
        """The judge, started.  A start that failed is tried again, unless the machine lacks
        something (``UserError``), which it will lack again.
        """
        if self._start is None or self._may_start_again(self._start):
            self._start = asyncio.ensure_future(self._started())
        return await asyncio.shield(self._start)

    async def close(self) -> None:
        """Ends the judge, if it has started."""
        if self._start is None:
            return
        self._start.cancel()
        (judge,) = await asyncio.gather(self._start, return_exceptions=True)
        if not isinstance(judge, BaseException):
            await judge.close()

    async def _started(self) -> Judge:
        judge = self._make()
        try:
            await judge.start()
        except BaseException:
            await judge.close()
            raise
        return judge

    def _may_start_again(self, start: asyncio.Task[Judge]) -> bool:
        return start.done() and not isinstance(start.exception(), (UserError, type(None)))
