"""The servers that host curator models: what config says of them and what each is able to do."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cosr_jax.curator.calls import ROLES, Charge, Request, Role, Usage
from cosr_jax.types import UserError

#: Least room for an answer that is worth asking with, in tokens.
_LEAST_ANSWER = 256

#: Parameters that a host may refuse: how its error names each.  In order: the first match is the
#: one given up.  (facts of November 2026: hosts answer 400 or 422 and name the parameter, or say
#: what they cannot do: "does not support thinking", "failed to parse grammar".)
_REFUSALS: Mapping[str, re.Pattern[str]] = {
    "response_format": re.compile(r"response_format|json.?schema|grammar|structured.?output", re.I),
    "reasoning_effort": re.compile(r"reasoning|thinking", re.I),
    "min_p": re.compile(r"min_p"),
    "top_k": re.compile(r"top_k"),
    "max_tokens": re.compile(r"max_tokens|max_completion_tokens"),
    "temperature": re.compile(r"temperature"),
    "top_p": re.compile(r"top_p"),
}
#: What takes a refused parameter's place; the others are left out.  Both names are in use for the
#: same limit, and a host that knows one may refuse the other.
_REPLACEMENTS = {"max_tokens": "max_completion_tokens"}

_OPTIONS = ("model", "key", "input", "output", "context", "sampling")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One model on one server."""

    name: str
    url: str  # up to and including /v1
    model: str
    key_variable: str = ""  # environment variable of the API key; "": the server needs none
    input_price: int = 0  # picodollars per token
    output_price: int = 0
    context: int = 65_536  # tokens of prompt and answer together
    extended_sampling: bool = True  # top_k and min_p are sent: some hosts truncate by default

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Charge:
        """One request's charge."""
        money = prompt_tokens * self.input_price + completion_tokens * self.output_price
        return Charge(1, prompt_tokens, completion_tokens, money)

    def charge(self, usage: Usage) -> Charge:
        """An answered request's charge."""
        return self.cost(usage.prompt_tokens, usage.completion_tokens)

    def api_key(self) -> str:
        """The key, or a placeholder where none is needed.

        Raises:
          UserError: the environment lacks the variable.
        """
        if not self.key_variable:
            return "none"
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise UserError(
                f"config.curator.llm.endpoints: {self.name} takes its API key from the "
                f"environment variable {self.key_variable}, which is not set",
                f"export {self.key_variable}=..., or leave key= out for a server without keys",
            )
        return key


class Abilities:
    """What an endpoint turned out not to be able to do; it holds for the whole run."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._context = endpoint.context
        self._given_up: list[str] = []  # parameters that it has refused

    def room_for_answer(self, request: Request) -> int:
        """Tokens that reasoning and answer may take; 0 where the prompt leaves too few."""
        room = self._context - request.prompt_tokens
        return min(request.max_tokens, room) if room >= _LEAST_ANSWER else 0

    def body(self, request: Request, **sampling: float) -> dict[str, Any]:
        """The JSON body of an HTTP request, without what the endpoint has refused."""
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [
                # A lone surrogate cannot be sent as UTF-8; json.loads makes them from "\ud800".
                {"role": m.role, "content": m.content.encode("utf-8", "replace").decode()}
                for m in request.messages
            ],
            "max_tokens": self.room_for_answer(request),
            "reasoning_effort": request.effort,
            **sampling,
        }
        if self._endpoint.extended_sampling:
            body |= {"top_k": -1, "min_p": 0.0}
        if request.schema is not None:
            schema = {"name": request.role, "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        for name in self._given_up:
            value = body.pop(name, None)
            if name in _REPLACEMENTS and value is not None:
                body[_REPLACEMENTS[name]] = value
        return body

    def refused(self, body: Mapping[str, Any], parameter: str, message: str) -> str:
        """Which parameter of ``body`` an error is about; "" where it is about none of them.

        Args:
          body: what was sent.
          parameter: the error's ``param`` field, if any.
          message: the error's text.
        """
        for name, pattern in _REFUSALS.items():
            if name in body and pattern.search(parameter or message):
                return name
        return ""

    def give_up(self, name: str) -> bool:
        """Leaves ``name`` out, or sends its replacement, from now on; whether that is news."""
        if name in self._given_up:
            return False
        self._given_up.append(name)
        return True

    def learn_context(self, tokens: int) -> bool:
        """Takes the length that the server says it has; whether it is less than we thought."""
        is_news = 2 * _LEAST_ANSWER <= tokens < self._context  # less is a slip, and would stay
        if is_news:
            self._context = tokens
        return is_news

    def state_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {"given_up": list(self._given_up), "context": self._context}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values; a shorter context in the config stays."""
        self._given_up = list(state["given_up"])
        self._context = min(self._endpoint.context, int(state["context"]))


def parse_endpoints(lines: tuple[str, ...]) -> dict[str, Endpoint]:
    """Reads ``config.curator.llm.endpoints``.

    Raises:
      UserError: a line is not 'NAME URL option=value ...', or a name comes twice.
    """
    endpoints: dict[str, Endpoint] = {}
    for line in lines:
        endpoint = _parse_endpoint(line)
        if endpoint.name in endpoints:
            raise _bad(line, f"{endpoint.name!r} is there twice", "give each its own name")
        endpoints[endpoint.name] = endpoint
    return endpoints


def parse_roles(
    lines: tuple[str, ...], endpoints: Mapping[str, Endpoint]
) -> dict[Role, tuple[Endpoint, ...]]:
    """Reads ``config.curator.llm.roles``: each role's endpoints, the preferred one first.

    Raises:
      UserError: a line is not role=name,name, or names what is not there.
    """
    key = "config.curator.llm.roles"
    routes: dict[Role, tuple[Endpoint, ...]] = {role: tuple(endpoints.values()) for role in ROLES}
    for line in lines:
        role, equals, names = (part.strip() for part in line.partition("="))
        if role not in routes or not equals:
            raise UserError(f"{key}: {line!r} is not role=name,name", f"roles: {', '.join(ROLES)}")
        wanted = [name.strip() for name in names.split(",")]
        unknown = [name for name in wanted if name not in endpoints]
        if unknown:
            raise UserError(
                f"{key}: {line!r} names the endpoint {unknown[0]!r}, which is not declared",
                f"declared in config.curator.llm.endpoints: {', '.join(endpoints) or 'none'}",
            )
        routes[role] = tuple(endpoints[name] for name in dict.fromkeys(wanted))
    return routes


def _bad(line: str, what: str, remedy: str) -> UserError:
    return UserError(f"config.curator.llm.endpoints: {line!r}: {what}", remedy)


def _parse_endpoint(line: str) -> Endpoint:
    words = line.split()
    if len(words) < 2 or not re.fullmatch(r"[\w.-]+", words[0]):
        example = "gpt-oss http://127.0.0.1:8000/v1 model=curator key=CURATOR_KEY"
        raise _bad(line, "not 'NAME URL option=value ...'", f"write e.g. {example!r}")
    name, url, *pairs = words
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise _bad(line, f"{url!r} is no plain http(s) address", "write http://host:port/v1")
    options = dict.fromkeys(_OPTIONS, "")
    for pair in pairs:
        option, _, value = pair.partition("=")
        if option not in options or not value or options[option]:
            raise _bad(line, f"{pair!r} is not an option=value", f"known: {', '.join(_OPTIONS)}")
        options[option] = value
    if options["sampling"] not in ("", "extended", "plain"):
        raise _bad(line, f"sampling={options['sampling']}", "write sampling=extended or plain")
    if not re.fullmatch(r"\w*", options["key"]):
        raise _bad(line, "key= is no name of an environment variable", "never write a key itself")
    return Endpoint(
        name=name,
        url=url.rstrip("/"),
        model=options["model"] or name,
        key_variable=options["key"],
        input_price=_price(line, options["input"]),
        output_price=_price(line, options["output"]),
        context=_context(line, options["context"]),
        extended_sampling=options["sampling"] != "plain",
    )


def _price(line: str, text: str) -> int:
    if not re.fullmatch(r"(\d+(\.\d*)?|\.\d+)?", text):
        raise _bad(line, f"{text!r} is no price", "write dollars per million tokens, e.g. 0.15")
    return round(float(text or 0) * 1e6)  # $ per 1e6 tokens = 1e-6 $ per token = 1e6 picodollars


def _context(line: str, text: str) -> int:
    if not re.fullmatch(r"\d{0,9}", text) or 0 < int(text or 0) < 2 * _LEAST_ANSWER:
        raise _bad(line, f"{text!r} is no context length", "write tokens, e.g. context=65536")
    return int(text or Endpoint.context)
