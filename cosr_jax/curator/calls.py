"""What goes into a curator call and what comes out: plain records, no I/O."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Role = Literal["analyst", "planner", "author", "checker"]
Effort = Literal["low", "medium", "high"]

ROLES: tuple[Role, ...] = ("analyst", "planner", "author", "checker")
LOWER_EFFORT: Mapping[Effort, Effort] = {"high": "medium", "medium": "low", "low": "low"}

#: Why a call brought nothing usable; the parser's kinds and the client's are one set.
KINDS = (
    "empty",
    "no_final",
    "truncated",
    "not_json",
    "refusal",
    "html",
    "schema",
    "all_dropped",
    "too_large",
    "ambiguous",
    "server_error",
    "transport",
)

#: Of the text that no tokenizer here can count: UTF-8 bytes to a token of English, code and JSON.
_BYTES_PER_TOKEN = 3
#: Tokens that a chat template adds to a message, and to a conversation (harmony's system turn).
_TOKENS_PER_MESSAGE, _TOKENS_PER_PROMPT = 8, 256


def estimate_tokens(text: str) -> int:
    """Tokens of ``text``, on the high side for English."""
    return math.ceil(_bytes(text) / _BYTES_PER_TOKEN)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of the conversation with a curator model."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a curator model.

    ``sample`` tells apart calls that want another answer to the same question: equal requests
    share one cached answer.
    """

    role: Role
    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None  # JSON schema of the answer; None: free text
    max_tokens: int = 8192  # of reasoning and answer together
    effort: Effort = "medium"
    sample: int = 0

    def key(self, models: Sequence[str], temperature: float, top_p: float) -> str:
        """SHA-256, in hex, of all that shapes the answer."""
        content = {**self.to_dict(), "models": list(models), "t": temperature, "p": top_p}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return dataclasses.asdict(self)

    @property
    def schema_hash(self) -> str:
        """First 16 hex digits of the schema's SHA-256; "" without a schema."""
        if self.schema is None:
            return ""
        return hashlib.sha256(json.dumps(self.schema, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length, estimated."""
        text = sum(estimate_tokens(m.content) for m in self.messages)
        return text + len(self.messages) * _TOKENS_PER_MESSAGE + _TOKENS_PER_PROMPT

    @property
    def most_prompt_tokens(self) -> int:
        """A bound of the prompt's length: no token of a byte-level vocabulary is under a byte."""
        text = sum(_bytes(m.content) for m in self.messages)
        return text + len(self.messages) * _TOKENS_PER_MESSAGE + _TOKENS_PER_PROMPT

    def lengthened(self) -> Request:
        """The same question with twice the room and less thinking."""
        return dataclasses.replace(
            self, max_tokens=2 * self.max_tokens, effort=LOWER_EFFORT[self.effort]
        )

    def reasked(self, answer: str, complaint: str) -> Request:
        """The same question, followed by the answer that was no good and by what is wrong."""
        turns = (
            Message("assistant", answer),
            Message(
                "user",
                f"That answer cannot be used: {complaint}\n"
                "Answer again, in full, with one JSON value that keeps to the schema.",
            ),
        )
        return dataclasses.replace(self, messages=(*self.messages, *turns))


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int  # reasoning included
    reasoning_tokens: int = 0  # 0 where the host does not tell
    is_estimated: bool = False  # counted from the text, as the host told nothing


@dataclasses.dataclass(frozen=True)
class Charge:
    """What one or more HTTP requests cost.  Integers, so that sums do not depend on their order."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    picodollars: int = 0  # 1e-12 dollars: one token at a millionth of a dollar per million

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def dollars(self) -> float:
        return self.picodollars / 1e12

    def __add__(self, other: Charge) -> Charge:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Charge(*(a + b for a, b in pairs))

    def __sub__(self, other: Charge) -> Charge:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Charge(*(a - b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's answer, as the host sent it; nothing in it has been believed yet."""

    content: str | None
    reasoning: str | None  # a draft, never a source of values
    refusal: str | None
    finish_reason: str | None
    usage: Usage  # of the request that was answered
    spent: Charge  # all requests of this call
    model: str  # as the host names it
    endpoint: str
    latency_s: float  # from the question to the answer, waiting included
    attempts: int  # HTTP requests
    from_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reply:
        """Rebuilds a reply from ``to_dict`` after a trip through JSON."""
        return cls(
            **{**values, "usage": Usage(**values["usage"]), "spent": Charge(**values["spent"])}
        )


@dataclasses.dataclass(frozen=True)
class Complaint:
    """Why an answer cannot be used: a kind of ``KINDS``, and what the model is told."""

    kind: str
    detail: str


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
    deadline_s: float = math.inf  # where less time is left than ``config.curator.llm`` gives
    endpoints: tuple[str, ...] = ()  # names of those to ask, in order; (): the role's


class CallError(Exception):
    """A call that brought nothing usable.

    Args:
      kind: one of ``KINDS``.
      reason: finer than ``kind``, from a small set: "http_500", "deadline", "breaker_open",
        "budget_tokens_per_run", "context_overflow", ...
      detail: for people.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        detail: str,
        *,
        spent: Charge | None = None,
        latency_s: float = 0.0,
        attempts: int = 0,
    ):
        super().__init__(f"{kind} ({reason}): {detail}")
        self.kind = kind
        self.reason = reason
        self.detail = detail
        self.spent = spent or Charge()
        self.latency_s = latency_s
        self.attempts = attempts

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        fields = ("kind", "reason", "detail", "latency_s", "attempts")
        values = {name: getattr(self, name) for name in fields}
        return {**values, "spent": dataclasses.asdict(self.spent)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CallError:
        """Rebuilds an error from ``to_dict`` after a trip through JSON."""
        return cls(**{**values, "spent": Charge(**values["spent"])})


def outcome_to_dict(outcome: Reply | CallError) -> dict[str, Any]:
    """What came of a call, as JSON-serialisable values; ``outcome_from_dict`` is the inverse."""
    return {"error" if isinstance(outcome, CallError) else "reply": outcome.to_dict()}


def outcome_from_dict(values: Mapping[str, Any]) -> Reply | CallError:
    """Rebuilds the outcome of a call after a trip through JSON; other keys do not matter."""
    if "error" in values:
        return CallError.from_dict(values["error"])
    return Reply.from_dict(values["reply"])
