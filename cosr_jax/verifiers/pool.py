"""The verifier pool as the rooms see it: ``judge`` a batch, here or on another host."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Task, UserError, Verdict
from cosr_jax.verifiers.front import Front, LocalFront
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.maths import check_forms

T = TypeVar("T")


def make_front(config: VerifierConfig) -> Front:
    """The judges of this host, or with ``config.url`` those of another one.

    Raises:
      UserError: the other host cannot be used from here.
    """
    if not config.url:
        return LocalFront(config)
    try:
        from cosr_jax.verifiers.remote import RemoteFront
    except ImportError as error:
        raise UserError(
            f"config.verifier.url: {config.url} needs aiohttp", "pip install 'cosr-jax[serve]'"
        ) from error
    return RemoteFront(config)


class VerifierPool:
    """Implements ``protocols.Verifier`` for every domain.  Use as a context manager, or ``close``.

    The judges live on an event loop in a thread of their own and start with the first case of
    their domain, so a pool that is asked for nothing costs nothing.

    Args:
      config: workers, limits, queue, what counts, and where the judges are.
      open_front: makes the front, on the event loop; tests put others here.

    Raises:
      UserError: ``config.accept`` names an unknown form, or ``config.url`` a host that cannot be
        used.
    """

    def __init__(
        self, config: VerifierConfig, open_front: Callable[[VerifierConfig], Front] = make_front
    ):
        check_forms(config.accept)
        self._config = config
        self._lock = threading.Lock()
        self._is_closed = False
        self._last_stats: dict[str, Any] = {}
        self._batches: set[asyncio.Task[Any]] = set()  # under way
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="verifier pool", daemon=True)
        self._thread.start()

        async def opened() -> Front:
            front = open_front(config)
            await front.start()
            return front

        try:
            self._front = self._run(opened())
        except BaseException:
            self._is_closed = True
            self._stop_loop()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def judge(
        self, cases: Sequence[tuple[Task, Completion]], limits: Limits | None = None
    ) -> list[Verdict]:
        """One verdict for each case, in order.

        Args:
          cases: any number, of any domains.
          limits: of each case; those of the config by default.

        Raises:
          UserError: nobody here can judge a task's domain.
          RuntimeError: the pool is closed, or is closed meanwhile.
        """
        return self._run(self._judge_all(cases, limits))

    async def judge_async(
        self, cases: Sequence[tuple[Task, Completion]], limits: Limits | None = None
    ) -> list[Verdict]:
        """``judge`` for callers with an event loop of their own."""
        return await asyncio.wrap_future(self._submit(self._judge_all(cases, limits)))

    def stats(self) -> dict[str, Any]:
        """Figures since the start; see ``front.Tally.stats``.  After ``close`` the last ones."""
        if self._is_closed:
            return self._last_stats
        return self._run(self._stats())

    def close(self) -> None:
        """Ends every process of the pool.  Whoever waits for verdicts gets ``RuntimeError``."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._stop_loop()

    async def _judge_all(
        self, cases: Sequence[tuple[Task, Completion]], limits: Limits | None
    ) -> list[Verdict]:
        batch = asyncio.current_task()
        assert batch
        self._batches.add(batch)
        judge = self._front.judge
        tasks = [asyncio.ensure_future(judge(task, said, limits)) for task, said in cases]
        try:
            return [self._marked(verdict) for verdict in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
            # Whoever gave up, or met an error, leaves no case running behind.
            await asyncio.gather(*tasks, return_exceptions=True)
            self._batches.discard(batch)

    def _marked(self, verdict: Verdict) -> Verdict:
        """``verdict``, left out of training if it is an opinion and config wants none."""
        if not verdict.is_subjective or self._config.train_on_subjective:
            return verdict
        return dataclasses.replace(verdict, is_left_out=True)

    async def _stats(self) -> dict[str, Any]:
        return self._front.stats()

    async def _close(self) -> None:
        self._last_stats = self._front.stats()
        batches = list(self._batches)
        for batch in batches:
            batch.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        await self._front.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:  # the loop ends with ``close``: nothing may come after it
            if self._is_closed:
                work.close()
                raise RuntimeError("the verifier pool is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the verifier pool was closed meanwhile") from None
        except BaseException:  # such as Ctrl-C
            future.cancel()
            raise

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
