"""``cosr verifier-serve``: the pool over HTTP, so that the hosts of a pod share one.

    POST /v1/judge   a case (``wire``) whose id is a string; answers with the verdict.  The same id
                     with the same body gets the same answer and is judged once; with another body
                     409.  429 with Retry-After while the domain's queue is full.  501 when this
                     host cannot judge the domain.
    GET /v1/rules    what counts here: clients that want other rules must not use this server
    GET /health      200 while it serves; needs no token
    GET /metrics     counters in Prometheus' text format

All but /health need ``Authorization: Bearer TOKEN``.  Traffic is not encrypted: listen on loopback,
or on a private network behind something that encrypts.  An answer "error" is not remembered: the
next request with its id is judged anew.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import hmac
import json
import signal
from pathlib import Path
from typing import Any

from aiohttp import web

from cosr_jax.config import VerifierConfig
from cosr_jax.types import UserError
from cosr_jax.verifiers import wire
from cosr_jax.verifiers.extraction import EXTRACTOR_VERSION
from cosr_jax.verifiers.front import LocalFront, config_limits

#: Larger bodies are refused with 413.
MAX_BODY_BYTES = 64 << 20

_REMEMBERED = 10_000  # answers; a client repeats within minutes
_RETRY_AFTER_S = 1
_SHUTDOWN_S = 10.0  # for cases under way, after the signal to stop


def read_token(path: str, where: str) -> str:
    """The token in a file.

    Args:
      path: the file.
      where: the flag or setting that names it, for the error message.

    Raises:
      UserError: there is none.
    """
    make = "write one, e.g. with python -c 'import secrets; print(secrets.token_urlsafe())' > FILE"
    if not path:
        raise UserError(f"{where} is missing", make)
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}={path}: {error}", make) from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"{where}={path} holds no token", make)
    return token


def rules(config: VerifierConfig) -> dict[str, Any]:
    """What a client and a server have to agree on for verdicts to mean the same."""
    return {
        "protocol": wire.PROTOCOL_VERSION,
        "extractor": EXTRACTOR_VERSION,
        "accept": sorted(config.accept),
        "partial_credit": config.partial_credit,
    }


def serve(config: VerifierConfig, host: str, port: int, token: str) -> int:
    """Serves until SIGTERM or Ctrl-C, lets the cases under way end, and returns 0.

    Args:
      config: of the pool.
      host: address to listen on.
      port: 0 takes a free one, which is printed.
      token: what clients must show.

    Raises:
      UserError: the address cannot be had, or the config asks for what this host lacks.
    """
    return asyncio.run(_serve(config, host, port, token))


async def _serve(config: VerifierConfig, host: str, port: int, token: str) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    front = LocalFront(config)
    runner = web.AppRunner(
        Service(front, config, token).app(), access_log=None, shutdown_timeout=_SHUTDOWN_S
    )
    try:
        await front.start()
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror})", "choose another --port"
            ) from error
        print(f"serving verdicts on http://{host}:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()
        await front.close()
    return 0


@dataclasses.dataclass(frozen=True)
class _Known:
    """An id that came before: what it stood for, and its answer, maybe still to come."""

    digest: bytes
    answer: asyncio.Task[dict[str, Any]]


class Service:
    """The HTTP side of a front.

    Args:
      front: judges; whoever made it closes it.
      config: rules and default limits.
      token: what clients must show.
    """

    def __init__(self, front: LocalFront, config: VerifierConfig, token: str):
        self._front = front
        self._rules = rules(config)
        self._limits = config_limits(config)
        self._credentials = f"Bearer {token}".encode()
        self._known: collections.OrderedDict[str, _Known] = collections.OrderedDict()

    def app(self) -> web.Application:
        """The routes, for ``aiohttp.web`` to run."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._check_token])
        app.router.add_post("/v1/judge", self._judge)
        app.router.add_get("/v1/rules", self._show_rules)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Any) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        is_open = request.path == "/health"
        if not is_open and not hmac.compare_digest(shown, self._credentials):
            return _failure(401, "the token is missing or wrong")
        return await handler(request)

    async def _judge(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            case = wire.parse_case(body, self._limits)
        except wire.BadCase as error:
            return _failure(400, str(error))
        if not isinstance(case.id, str) or not case.id:
            return _failure(400, f"id is {case.id!r:.100}, not a string that can be remembered")
        digest = hashlib.sha256(body).digest()
        known = self._known.get(case.id)
        if known is None:
            if self._front.is_full(case.task.domain):
                full = _failure(429, f"the queue of {case.task.domain} cases is full")
                full.headers["Retry-After"] = str(_RETRY_AFTER_S)
                return full
            known = _Known(digest, asyncio.ensure_future(self._answer(case)))
            self._remember(case.id, known)
        elif known.digest != digest:
            return _failure(409, f"id {case.id!r:.100} came before with another body")
        try:
            # A client who hangs up and asks again must find the case under way.
            return web.json_response(await asyncio.shield(known.answer))
        except UserError as error:
            return _failure(501, str(error))

    async def _answer(self, case: wire.Case) -> dict[str, Any]:
        try:
            verdict = await self._front.judge(case.task, case.completion, case.limits)
        except BaseException:
            self._known.pop(case.id, None)
            raise
        answer = wire.answer_dict(case.id, verdict, case.is_verbose)
        if answer["verdict"] == "error":
            self._known.pop(case.id, None)
        return answer

    def _remember(self, case_id: str, known: _Known) -> None:
        self._known[case_id] = known
        if len(self._known) > _REMEMBERED and next(iter(self._known.values())).answer.done():
            self._known.popitem(last=False)

    async def _show_rules(self, request: web.Request) -> web.Response:
        return web.json_response(self._rules)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=prometheus(self._front.stats()))


def prometheus(stats: dict[str, Any]) -> str:
    """``Front.stats`` in Prometheus' text exposition format."""
    lines = ["# TYPE cosr_verifier_verdicts_total counter"]
    for domain, counts in sorted(stats["by_domain"].items()):
        for category, count in sorted(counts.items()):
            labels = f'{{domain="{domain}",category="{category}"}}'
            lines.append(f"cosr_verifier_verdicts_total{labels} {count}")
    for name in ("retries", "restarts"):
        lines.append(f"# TYPE cosr_verifier_{name}_total counter")
        lines.append(f"cosr_verifier_{name}_total {stats[name]}")
    lines.append("# TYPE cosr_verifier_queue_length gauge")
    lines.append(f"cosr_verifier_queue_length {stats['queue']}")
    lines.append("# TYPE cosr_verifier_latency_seconds summary")
    for quantile, name in ((0.5, "latency_p50_s"), (0.95, "latency_p95_s")):
        lines.append(f'cosr_verifier_latency_seconds{{quantile="{quantile}"}} {stats[name]}')
    return "\n".join(lines) + "\n"


def _failure(status: int, message: str) -> web.Response:
    return web.Response(
        status=status, text=json.dumps({"error": message}), content_type="application/json"
    )
