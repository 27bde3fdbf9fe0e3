"""The front of judges on another host: a client of ``cosr verifier-serve``."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from typing import Any

import aiohttp

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Task, UserError, Verdict
from cosr_jax.verifiers import wire
from cosr_jax.verifiers.front import Tally, case_deadline_s, config_limits
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.service import read_token, rules

_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2  # then three times as long each time: 8 s in all, enough for a restart
_CONNECT_S = 10.0
_MAX_CONNECTIONS = 256


class RemoteFront:
    """Implements ``front.Front`` with the judges of ``config.url``.

    A lost connection and an answer that says that the server has failed are tried again; cases are
    judged once all the same, for their ids stay.  What is still missing then is an ERROR.

    Args:
      config: where the server is, its token, limits of cases, and what counts.

    Raises:
      UserError: the token cannot be read.
    """

    def __init__(self, config: VerifierConfig):
        self._config = config
        self._limits = config_limits(config)
        self._room = asyncio.Semaphore(config.queue)
        self._token = read_token(config.token_file, "config.verifier.token_file")
        self._names = (f"{uuid.uuid4().hex}/{n}" for n in itertools.count())
        self._session: aiohttp.ClientSession | None = None
        self._tally = Tally()

    async def start(self) -> None:
        """Connects, and asks whether the server judges by our rules.

        Raises:
          UserError: it cannot be reached, refuses the token, or has other rules.
        """
        url = self._config.url
        try:
            self._session = aiohttp.ClientSession(
                url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {self._token}"},
                connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
                # How long an answer may take depends on the case: see ``_ask``.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            )
            async with self._session.get("v1/rules") as response:
                await self._refuse_mistakes(response)
                theirs = await response.json()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            await self.close()
            raise UserError(
                f"config.verifier.url: {url} does not answer ({type(error).__name__}: {error})",
                "start cosr verifier-serve there, or take the setting out",
            ) from error
        except UserError:
            await self.close()
            raise
        ours = rules(self._config)
        if theirs != ours:
            await self.close()
            raise UserError(
                f"config.verifier.url: {url} judges by other rules ({theirs}, not {ours})",
                "start the server with the run's config and the same version of cosr",
            )

    async def judge(
        self, task: Task, completion: Completion, limits: Limits | None = None
    ) -> Verdict:
        """See ``front.Front``.

        Raises:
          UserError: the server refuses the token, or cannot judge the domain.
        """
        limits = limits or self._limits
        case = wire.Case(next(self._names), task, completion, limits, is_verbose=True)
        body = json.dumps(wire.case_dict(case)).encode()
        async with self._room:
            self._tally.wait()
            began = time.perf_counter()
            try:
                verdict = await self._ask(body, case_deadline_s(self._config, task, limits))
                self._tally.count(task.domain, verdict, time.perf_counter() - began)
                return verdict
            finally:
                self._tally.waiting -= 1

    def stats(self) -> dict[str, Any]:
        """``Tally.stats`` of this client's cases; latencies include the way there and back."""
        return {**self._tally.stats(), "restarts": 0}

    async def close(self) -> None:
        """Closes the connections."""
        if self._session:
            await self._session.close()

    async def _ask(self, body: bytes, deadline_s: float) -> Verdict:
        pause, detail = _FIRST_PAUSE_S, ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._tally.retries += 1
                await asyncio.sleep(pause)
                pause *= 3
            try:
                # Two attempts of the server's, of which each may take as long.
                async with asyncio.timeout(2 * deadline_s):
                    return await self._post(body)
            except TimeoutError:
                detail = f"no answer within {2 * deadline_s:g} s"
            except (aiohttp.ClientError, OSError, ValueError) as error:
                detail = f"{type(error).__name__}: {error}"
        return wire.error_verdict(f"{self._config.url}: {detail}")

    async def _post(self, body: bytes) -> Verdict:
        """The server's verdict, after waiting for room in its queue.

        Raises:
          aiohttp.ClientError, OSError, ValueError: the answer is none, so that asking again is
            worth it.
        """
        assert self._session
        headers = {"Content-Type": "application/json"}
        while True:
            async with self._session.post("v1/judge", data=body, headers=headers) as response:
                if response.status == 200:
                    return wire.verdict_of(json.loads(await response.read()))
                if response.status != 429:
                    await self._refuse_mistakes(response)
                    return wire.error_verdict(f"{response.status}: {await _reason(response)}")
                wait_s = float(response.headers.get("Retry-After", 1))
            await asyncio.sleep(wait_s)

    async def _refuse_mistakes(self, response: aiohttp.ClientResponse) -> None:
        """Raises what says who is to mend it; returns if only this case is to blame."""
        if response.status in (401, 403, 404, 501):
            raise UserError(
                f"config.verifier.url: {self._config.url} says {response.status} "
                f"({await _reason(response)})",
                "check the address and config.verifier.token_file, or mend the server",
            )
        if response.status >= 500:
            response.raise_for_status()


async def _reason(response: aiohttp.ClientResponse) -> str:
    text = await response.text(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, TypeError, KeyError):
        return " ".join(text.split())[:200] or str(response.reason)
