"""``cosr doctor --curator=...``: whether a server can be a curator, by asking it as a run would."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator import prompts
from cosr_jax.curator.calls import CallError, Message, Question, Reply, Request
from cosr_jax.curator.client import Client
from cosr_jax.curator.endpoints import Endpoint, parse_endpoints
from cosr_jax.curator.failures import Failure as FailedAnswer
from cosr_jax.curator.framing import final_answer
from cosr_jax.curator.parsing import parse
from cosr_jax.curator.schemas import Context, json_schema
from cosr_jax.curator.wire import Connection, Failure, Served, require_openai
from cosr_jax.run.checks import Check, ask_all
from cosr_jax.types import CellEvidence, UserError

#: Seconds for the list of models, and for one trial call.
_LIST_S, _CALL_S = 10.0, 300.0
#: Of a trial call, reasoning included; a model that needs more has lost its way.
_ANSWER_TOKENS = 4096

#: What servers that list no models answer.
_NO_LIST = ("http_404", "http_405", "http_501")

_OFF_TOPIC = "Tell me in one sentence what the weather is like at sea."
_CONTEXT = Context(known_task_ids={"t1", "t2", "t3"}, known_skills={"addition"}, max_items=4)
_FAILURES = tuple(
    FailedAnswer(
        task_id=f"t{number}",
        skill="addition",
        difficulty=0.3,
        prompt=f"What is {a} + {b}? End with \\boxed{{answer}}.",
        expected=str(a + b),
        response=f"{a} + {b} is \\boxed{{{a + b - 10}}}",  # the carry is lost
        category="wrong_answer",
        detail="",
    )
    for number, (a, b) in enumerate([(47, 38), (59, 26), (68, 17)], start=1)
)
_RATES = (CellEvidence("addition/2", samples=12, passed=9, value_correct=9, formatted=12),)

_NO_API = "give the address of an OpenAI-compatible API, e.g. http://127.0.0.1:8000/v1"
_REMEDIES = {
    "connection": "start the server (launch/curator_server.sh), or check host and port",
    "timeout": "wait until the server is ready and idle, or choose a faster model",
    "deadline": "wait until the server is ready and idle, or choose a faster model",
    "http_404": "end the address as the server does, mostly in /v1, and check model=",
    "http_429": "it has no room for more: try later, or lower config.curator.llm.concurrency",
    "context_overflow": "serve the model with a longer context: runs need 16384 tokens or more",
    "truncated": f"choose another model: {_ANSWER_TOKENS} tokens are plenty for this answer",
    "no_final": "have the server separate reasoning from answers (docs/curator.md, Servers)",
    "empty": "look into the server's log; a model that says nothing is of no use",
    "rejected": "choose a stronger model, or a server that enforces schemas",
}


def check_curator(text: str) -> int:
    """Asks the server, prints a line for each finding and returns the exit code.

    Args:
      text: its address, or one line of ``config.curator.llm.endpoints``, with or without the name;
        without a name and ``model=`` the first model that the server lists is asked.

    Raises:
      UserError: ``text`` is neither, its API key is not set, or the openai package is missing.
    """
    require_openai()
    with _without_warnings():
        return ask_all(_Examination(text).checks())


class _Examination:
    """The questions to one server, and what its answers told so far."""

    def __init__(self, text: str):
        is_named = not text.lstrip().startswith(("http:", "https:"))
        self._line = text if is_named else f"curator {text}"
        self._is_given = is_named or " model=" in text
        self._replies: list[Reply] = []
        self._is_silent = False
        self._read_line()
        self._endpoint.api_key()

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("server", self.server, is_needed=True),
            Check("model", self.model, is_needed=True),
            Check("schema", self.schema),
            Check("analyst", self.analyst),
            Check("reasoning", self.reasoning),
        )

    def server(self) -> str:
        """That it answers, and how fast."""
        started = time.monotonic()
        try:
            self._served: tuple[Served, ...] | None = asyncio.run(_models(self._endpoint))
        except Failure as failure:
            if failure.reason not in _NO_LIST or not self._is_given:
                raise self._trouble(failure.reason, failure.detail) from failure
            self._served = None
        return f"{self._endpoint.url} answers in {time.monotonic() - started:.2f} s"

    def model(self) -> str:
        """That it has the model, with the context that a run counts on."""
        if self._served is None:
            return f"{self._endpoint.model}; the server lists none, so this is taken on trust"
        names = [served.name for served in self._served]
        if not names:
            raise UserError(f"{self._endpoint.url} serves no model", "load one into the server")
        if not self._is_given:
            self._line += f" model={names[0]}"
            self._read_line()
        if self._endpoint.model not in names:
            raise UserError(
                f"{self._endpoint.url} has no model {self._endpoint.model!r}",
                f"write model={names[0]}; it serves {', '.join(names)}",
            )
        found = self._endpoint.model
        if len(names) > 1:
            found += f", one of {', '.join(names)}"
        context = self._served[names.index(self._endpoint.model)].context
        if not context:
            room = self._endpoint.context
            return f"{found}; it does not tell its context, so runs count on {room} tokens"
        if context < self._endpoint.context:
            return f"{found}; {context} tokens of context: add context={context} to the endpoint"
        return f"{found}; {context} tokens of context"

    def schema(self) -> str:
        """That a schema binds the answer, even to a question that has nothing to do with it."""
        schema = json_schema("analysis", _CONTEXT)
        request = Request(
            "analyst", (Message("user", _OFF_TOPIC),), schema, _ANSWER_TOKENS, effort="low"
        )
        client = self._client()
        reply = self._ask(client, request)
        if client.tally.counts["downgraded/response_format"]:
            raise UserError("the server refuses JSON schemas", _other_server())
        content = reply.content or ""
        try:
            json.loads(content)
        except ValueError as error:
            raise UserError(
                f"the schema was ignored: the answer is no JSON ({_shown(content)})",
                _other_server(),
            ) from error
        result = parse("analysis", reply, _CONTEXT)
        if result.error or result.drops:
            why = result.detail or "; ".join(drop.detail for drop in result.drops)
            raise UserError(
                f"the schema was ignored: the answer's JSON is another ({why})", _other_server()
            )
        return f"enforced, also where the prompt does not mention it; {_cost(reply)}"

    def analyst(self) -> str:
        """That an analyst's answer can be used, and what it takes; one call, as in a run."""
        build = functools.partial(prompts.analyst, _FAILURES, _RATES, _CONTEXT, seed=0)
        prompt = build(max_tokens=prompts.LEAST_TOKENS)
        request = dataclasses.replace(prompt.request, max_tokens=_ANSWER_TOKENS)
        client = self._client()
        reply = self._ask(client, request)
        result = parse("analysis", reply, prompt.context)
        if result.value is None:
            raise self._trouble("rejected", f"{result.error}: {result.detail or 'no reason given'}")
        claims = len(result.value["weaknesses"])
        refused = [name for name in client.tally.counts if name.startswith("downgraded/")]
        note = "".join(f"; the server refuses {name.partition('/')[2]}" for name in refused)
        return f"{claims} weaknesses claimed of three planted slips; {_cost(reply)}{note}"

    def reasoning(self) -> str:
        """That drafts come apart from answers."""
        if not self._replies:
            raise UserError("no answer came that could tell", "mend what is said above")
        for reply in self._replies:
            content = reply.content or ""
            if final_answer(content) != content:
                raise UserError(
                    f"reasoning is mixed into the answer ({_shown(content)})",
                    "start the server with the model's reasoning parser (docs/curator.md, Servers)",
                )
        lengths = [len(reply.reasoning or "") for reply in self._replies]
        if any(lengths):
            return f"in a field of its own, {max(lengths)} characters"
        return "none, which is right for a model that does not reason"

    def _read_line(self) -> None:
        (self._endpoint,) = parse_endpoints((self._line,)).values()

    def _client(self) -> Client:
        config = CuratorLlmConfig(
            endpoints=(self._line,), max_attempts=1, timeout_s=_CALL_S, deadline_s=_CALL_S
        )
        return Client(config)

    def _ask(self, client: Client, request: Request) -> Reply:
        if self._is_silent:
            raise UserError("not asked, as the call before got no answer", _REMEDIES["timeout"])
        try:
            reply = client.ask(Question(request))
        except CallError as error:
            self._is_silent = error.reason in ("timeout", "deadline")
            raise self._trouble(error.reason, error.detail) from error
        if reply.finish_reason == "length":
            raise self._trouble("truncated", f"{reply.usage.completion_tokens} tokens and no end")
        self._replies.append(reply)
        return reply

    def _trouble(self, reason: str, detail: str) -> UserError:
        """What went wrong, with what to do about it."""
        endpoint = self._endpoint
        what = f"{endpoint.url}: {detail or reason}"
        if reason in ("http_401", "http_403"):
            variable = endpoint.key_variable
            if variable:
                return UserError(what, f"check the key in the environment variable {variable}")
            return UserError(what, "name the environment variable that holds the key: add key=NAME")
        remedy = "look into the server's log" if reason.startswith("http_5") else _NO_API
        return UserError(what, _REMEDIES.get(reason, remedy))


async def _models(endpoint: Endpoint) -> tuple[Served, ...]:
    connection = Connection(endpoint)
    try:
        async with asyncio.timeout(_LIST_S):
            return await connection.models()
    except TimeoutError:
        raise Failure("transport", "timeout", f"no list of models in {_LIST_S:g} s") from None
    finally:
        await connection.close()


def _cost(reply: Reply) -> str:
    usage, spent = reply.usage, reply.spent
    tokens = f"{spent.prompt_tokens} tokens in, {spent.completion_tokens} out"
    if usage.reasoning_tokens:
        tokens += f" ({usage.reasoning_tokens} of reasoning)"
    if usage.is_estimated:
        tokens += " (estimated)"
    price = f"${spent.dollars:.6f}" if spent.picodollars else "no price given (input=, output=)"
    return f"{reply.latency_s:.1f} s, {tokens}, {price}"


def _other_server() -> str:
    return "use a server with structured output (docs/curator.md, Servers), or expect many re-asks"


def _shown(text: str) -> str:
    """The beginning of an answer, on one line."""
    line = " ".join(text[:200].split())
    return repr(line if len(line) <= 60 else f"{line[:60]}…")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The client logs what the checks say themselves, better."""
    logger = logging.getLogger("cosr_jax.curator")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
