"""One HTTP request to an OpenAI-compatible server: every way it can go wrong gets a name.

The ``openai`` package sends and authenticates.  The body is read and parsed here, because the
package reads bodies of any size, hands out HTML as a string, lets a cut body end in a bare
JSONDecodeError, and takes ``{"error": ...}`` with status 200 for a completion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cosr_jax.curator.backoff import retry_after_s
from cosr_jax.curator.calls import Usage, estimate_tokens
from cosr_jax.curator.endpoints import Endpoint
from cosr_jax.types import UserError

if TYPE_CHECKING:
    import httpx2

#: No honest answer is longer: 16k tokens are some 100 kB.
MAX_BODY_BYTES = 8 << 20
#: Tokens over which a usage is a slip of the host's, not a count.
_MOST_TOKENS = 10_000_000
_CONNECT_S = 10.0
_RETRYABLE = frozenset({408, 409, 429})
_CONTEXT_OVERFLOW = re.compile(
    r"context.?(length|window|size)|maximum (context|model)|max_model_len|prompt.{0,20}too long"
    r"|too many (input |prompt )?tokens|longer than the",
    re.I,
)


#: "This model's maximum context length is 2048 tokens", "the available context size (2048 tokens)",
#: "max_tokens=8192 cannot be greater than max_model_len=2048".
_CONTEXT_TOKENS = re.compile(
    r"(?:context (?:length|size|window)|max_model_len)\D{0,20}(\d{3,8})\b", re.I
)


class Failure(Exception):
    """A request without a usable answer.

    Args:
      kind: one of ``calls.KINDS``.
      reason: from a small set, for counting.
      detail: for people.
      is_retryable: the same request may fare better later.
      is_sick: the server, not the request or the model, is to blame.
      retry_after_s: what the server asks for.
      parameter, message: what a 4xx error says about the request.
      context: the server's context in tokens, as an overflow tells; 0: it does not tell.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        detail: str,
        *,
        is_retryable: bool = True,
        is_sick: bool = True,
        retry_after_s: float | None = None,
        parameter: str = "",
        message: str = "",
        context: int = 0,
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.kind = kind
        self.reason = reason
        self.detail = detail
        self.is_retryable = is_retryable
        self.is_sick = is_sick
        self.retry_after_s = retry_after_s
        self.parameter = parameter
        self.message = message
        self.context = context


@dataclasses.dataclass(frozen=True)
class Answer:
    """The first choice of a well-formed completion."""

    content: str | None
    reasoning: str | None
    refusal: str | None
    finish_reason: str | None
    usage: Usage | None  # None: the host did not tell
    model: str  # "": the host did not tell


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that a server lists."""

    name: str
    context: int  # tokens of prompt and answer together; 0: the server does not tell


class _TooLarge(Exception):
    """The body went over ``MAX_BODY_BYTES``."""


def require_openai() -> None:
    """Imports the ``openai`` package.

    Raises:
      UserError: it is not installed.
    """
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the language-model curator needs the openai package",
            "pip install 'cosr-jax[llm]', or set config.curator.kind to procedural",
        ) from error


class Connection:
    """An open client of one endpoint; belongs to the event loop that it is used in.

    Raises:
      UserError: the API key is missing.
    """

    def __init__(self, endpoint: Endpoint):
        import httpx2
        import openai

        async def cap(response: httpx2.Response) -> None:
            response.stream = _capped(response)

        self._key = endpoint.api_key()
        self._errors = (openai.APIConnectionError, httpx2.HTTPError, httpx2.StreamError)
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self._key,
            max_retries=0,
            # How long a request may take in all is the caller's business; no dead host deserves
            # all of that time for a connection.
            timeout=openai.Timeout(None, connect=_CONNECT_S),
            # A compressed body could hide gigabytes under the cap.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,  # questions and keys go where config says
                # Reading the machine's certificates takes 20 ms, and plain HTTP needs none.
                verify=endpoint.url.startswith("https:"),
                event_hooks={"response": [cap]},
            ),
        )
        # From the environment: these are OpenAI's, and other hosts have no business with them.
        self._client.organization = self._client.project = None

    async def close(self) -> None:
        """Drops the connections."""
        await self._client.close()

    async def send(self, body: Mapping[str, Any]) -> Answer:
        """Sends one request.

        Raises:
          Failure: anything but a well-formed completion came back.
        """
        create = self._client.chat.completions.with_streaming_response.create
        with self._named_failures():
            # extra_body alone: the package would refuse or drop fields that it does not know.
            async with create(messages=[], model=body["model"], extra_body=dict(body)) as response:
                raw = await response.read()
            return parse_body(raw, response.headers.get("content-type", ""))

    async def models(self) -> tuple[Served, ...]:
        """The models that the server lists.

        Raises:
          Failure: anything but a list of models came back.
        """
        with self._named_failures():
            async with self._client.models.with_streaming_response.list() as response:
                raw = await response.read()
            return parse_models(raw, response.headers.get("content-type", ""))

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turns whatever a request can end in into a ``Failure``."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            raise self._clean(_status_failure(error)) from None
        except _TooLarge:
            raise Failure(
                "too_large", "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes"
            ) from None
        except self._errors as error:
            cause = error.__cause__ or error
            detail = f"{type(cause).__name__}: {cause}"
            raise self._clean(Failure("transport", "connection", detail)) from None
        except Failure as failure:
            raise self._clean(failure) from None

    def _clean(self, failure: Failure) -> Failure:
        """The failure without the API key, which some servers quote in their errors."""
        if len(self._key) > 4:
            for name in ("detail", "message"):
                text = getattr(failure, name).replace(self._key, "<API key>")
                setattr(failure, name, text)
            failure.args = (f"{failure.reason}: {failure.detail}",)
        return failure


def _capped(response: httpx2.Response) -> Any:
    import httpx2

    class Capped(httpx2.AsyncByteStream):
        """The response's stream up to the limit; an exception beyond it."""

        def __init__(self, stream: Any):
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise Failure(
                    "not_json", "compressed", "a compressed body, which was not asked for"
                )
            size = 0
            async for chunk in self._stream:
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise _TooLarge
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    return Capped(response.stream)


def _status_failure(error: Any) -> Failure:
    """What a status other than 2xx means for the request and for the server."""
    status, message, parameter = error.status_code, "", ""
    if isinstance(error.body, Mapping):  # the package has unwrapped {"error": ...}
        message = _text(error.body.get("message")) or json.dumps(error.body, default=str)
        parameter = _text(error.body.get("param")) or ""
    elif isinstance(error.body, str):
        message = error.body
    detail = f"HTTP {status}: {_one_line(message)}"
    if status in (400, 413, 422) and _CONTEXT_OVERFLOW.search(message):
        told = _CONTEXT_TOKENS.search(message)
        return Failure(
            "transport",
            "context_overflow",
            detail,
            is_retryable=False,
            is_sick=False,
            context=int(told[1]) if told else 0,
        )
    is_retryable = status in _RETRYABLE or status >= 500
    return Failure(
        "server_error",
        f"http_{status}",
        detail,
        is_retryable=is_retryable,
        # The server is well if it only dislikes this request; a wrong key or path it dislikes
        # in every request.
        is_sick=is_retryable or status in (401, 403, 404) or status < 400,
        retry_after_s=retry_after_s(error.response.headers, time.time()),
        parameter=parameter if status in (400, 422) else "",
        message=message[:500] if status in (400, 422) else "",  # later, it may quote the prompt
    )


def parse_body(raw: bytes, content_type: str) -> Answer:
    """Reads a completion from a body with status 200; whatever the content type says, JSON counts.

    Raises:
      Failure: it is none.
    """
    body = _json_object(raw, content_type)
    complaint = body.get("error")
    if complaint and not body.get("choices"):
        raise Failure("server_error", "error_in_200", _one_line(json.dumps(complaint)))
    return _first_choice(body)


def parse_models(raw: bytes, content_type: str) -> tuple[Served, ...]:
    """Reads a list of models: their ids and, where a server tells, their contexts.

    Raises:
      Failure: it is none.
    """
    listed = _json_object(raw, content_type).get("data")
    if not isinstance(listed, list):
        raise Failure("schema", "no_list", "the body holds no list of models")
    return tuple(
        Served(model["id"], _count(model.get("max_model_len")) or 0)  # vLLM's and SGLang's name
        for model in listed
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    )


def _json_object(raw: bytes, content_type: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure("not_json", "not_utf8", str(error)) from None
    if not text.strip():
        raise Failure("empty", "empty_body", "a body without content")
    try:
        body = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if "html" in content_type.lower() or text.lstrip().startswith("<"):
            raise Failure("html", "html", _one_line(text)) from None
        raise Failure("not_json", "bad_json", f"{error}: {_one_line(text)}") from None
    if not isinstance(body, dict):
        raise Failure("schema", "bad_envelope", f"the body is no object: {_one_line(text)}")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Failure("ambiguous", "duplicate_keys", "a key of the body comes twice")
    return values


def _first_choice(body: Mapping[str, Any]) -> Answer:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Failure("schema", "no_choices", "the completion has no choices")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Failure("schema", "no_message", "the first choice has no message")
    if choice.get("finish_reason") in ("abort", "error"):
        raise Failure("server_error", "aborted", "the server gave the generation up")
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content)
    if content is not None and not isinstance(content, str):
        raise Failure("schema", "bad_content", f"the content is a {type(content).__name__}")
    reasoning = _text(message.get("reasoning")) or _text(message.get("reasoning_content"))
    return Answer(
        content=_unicode(content),
        reasoning=_unicode(reasoning),
        refusal=_unicode(_text(message.get("refusal"))),
        finish_reason=_text(choice.get("finish_reason")),
        usage=_usage(body.get("usage")),
        model=_text(body.get("model")) or "",
    )


def _joined_parts(parts: list[Any]) -> str:
    """The text of content that comes as ``[{"type": "text", "text": ...}, ...]``."""
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(parts):
        raise Failure("schema", "bad_content", "the content is a list of other things than text")
    return "".join(known)


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    prompt, completion = _count(value.get("prompt_tokens")), _count(value.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    details = value.get("completion_tokens_details")
    reasoning = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, completion, min(reasoning or 0, completion))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def counted(answer: Answer, prompt_tokens: int) -> Usage:
    """The usage that the host told, or else (or if it told of no tokens) one from the text."""
    texts = (answer.content, answer.reasoning, answer.refusal)
    completion = sum(estimate_tokens(text) for text in texts if text)
    if answer.usage is not None and (answer.usage.completion_tokens or not completion):
        return answer.usage
    reasoning = estimate_tokens(answer.reasoning or "")
    return Usage(prompt_tokens, completion, reasoning, is_estimated=True)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _unicode(text: str | None) -> str | None:
    """Without lone surrogates (``"\\ud800"`` is legal JSON), which no file or socket takes."""
    return (
        None if text is None else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def _one_line(text: str, limit: int = 200) -> str:
    """The beginning of ``text``, fit for a log."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[:limit] + "…"
