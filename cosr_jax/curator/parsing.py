"""Turns a curator model's raw answer into a canonical value, or into the reason why there is none.

``parse`` believes nothing and invents nothing.  A whole answer that is strict JSON is taken as it
is.  Otherwise the final answer is cut out of its frames (``framing``), values are read with repairs
of syntax only (``repair``), each item is checked against the schema and the call's context
(``schemas``), and tasks prove themselves (``proving``).  What is whole and valid is kept, the rest
is counted with its reason.

Choices that the rules leave open:

- Of several values the last complete one with a valid item counts, then the last cut one.
- Lists keep the first ``max_items`` valid items; a string over ``max_string`` is refused, not cut.
- A key given twice counts with its last value.
- Weaknesses stand under their key; only tasks may be a bare list.  An empty list of tasks is none.
- ``finish_reason`` never spoils a whole value; it only names the error when there is none.

Errors, in the order in which they are looked for:

  too_large     over ``MAX_CHARS`` characters
  refusal       the refusal field is set; with no value found: ``content_filter``, or an apology
  truncated, no_final, empty   no text, or nothing but reasoning: ``truncated`` if the length limit
                cut it, else ``no_final`` if there is reasoning, else ``empty``
  html, server_error   a page or an error report instead of an answer
  ambiguous     a list of different plans, or opinions
  all_dropped   whole items were there and none could be kept
  truncated     a value was cut before its first whole item, or the limit cut prose before a value
  schema        JSON of another shape
  not_json      none of these

``transport`` is the client's to report: nothing arrived that could be parsed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from cosr_jax.curator.framing import final_answer
from cosr_jax.curator.overlap import Phrases, fold
from cosr_jax.curator.proving import Judge, prove
from cosr_jax.curator.repair import BROKEN, CutDict, CutList, strict, values
from cosr_jax.curator.schemas import (
    ITEMS_KEY,
    OF_ONE,
    SCHEMAS,
    Context,
    Invalid,
    Schema,
    read_object,
    unknown_ids,
)

#: Longer content is refused without a look.
MAX_CHARS = 1_000_000


class ResponseLike(Protocol):
    """What ``parse`` reads of a model's answer."""

    @property
    def content(self) -> str | None: ...
    @property
    def reasoning(self) -> str | None: ...
    @property
    def refusal(self) -> str | None: ...
    @property
    def finish_reason(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class Response:
    """A model's answer as the server sent it."""

    content: str | None
    reasoning: str | None = None  # a draft: never a source of values
    refusal: str | None = None
    finish_reason: str | None = "stop"


@dataclasses.dataclass(frozen=True)
class Drop:
    """Something that was not kept.

    Attributes:
      index: the item's place in the list that was chosen, from 0.
      reason: "cut", "broken", "type", "missing", "enum", "range", "length", "evidence", "repeat",
        "existing", "leak", "reference", "vacuous", "unjudged" or "too_many".
      detail: in words, without text of the item.
    """

    index: int
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class ParseResult:
    """What came of an answer.

    Attributes:
      value: canonical, as plain JSON values; None if there is an error.
      error: "" or one of the kinds listed above.
      drops: the items not kept, in order.
      dropped_ids: ids that weaknesses cite and nobody knows, in order, repeats included.
      detail: what is wrong, in words, for people and for the model that is asked again.
    """

    value: Mapping[str, Any] | None
    error: str = ""
    drops: tuple[Drop, ...] = ()
    dropped_ids: tuple[str, ...] = ()
    detail: str = ""

    @property
    def dropped(self) -> int:
        """How many items were not kept."""
        return len(self.drops)

    @property
    def reasons(self) -> dict[str, int]:
        """How many items were not kept for which reason."""
        return dict(collections.Counter(drop.reason for drop in self.drops))


def parse(
    schema: Schema, response: ResponseLike, context: Context, judge: Judge | None = None
) -> ParseResult:
    """The value of an answer, by the rules above.

    It never raises for what the model wrote, and takes time linear in its length; for tasks, the
    verifier's runs come on top.

    Args:
      schema: "analysis", "plan", "tasks" or "opinion".
      response: the answer; any record with these four attributes.
      context: what the call knows.
      judge: ``protocols.Verifier.judge``, with which tasks prove themselves.  Without it maths
        tasks are compared as rational numbers or text.

    Raises:
      ValueError: an unknown schema, or code tasks and no judge to prove them.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"schema {schema!r} is none of {', '.join(SCHEMAS)}")
    content = response.content or ""
    if len(content) > MAX_CHARS:
        return _error("too_large", f"the answer has over {MAX_CHARS} characters")
    if response.refusal:
        return _error("refusal", "the model refused")
    was_cut = response.finish_reason in _CUT_REASONS
    text = content.strip().strip("\ufeff").strip()
    if not text:
        kind = "truncated" if was_cut else "no_final" if response.reasoning else "empty"
        return _error(kind, "there is no text besides reasoning")
    judging = _Judging(schema, context, judge)
    try:
        whole = strict(text)
    except ValueError:
        pass
    else:
        return judging.best([whole]) or _error("schema", "it is a string")
    if _HTML.match(text):
        return _error("html", "it is a web page")
    final = final_answer(text)
    if final is None or not final.strip():
        kind = "truncated" if was_cut else "no_final"
        return _error(kind, "it is reasoning without a final answer")
    result = judging.best([found.value for found in values(final)])
    if result is not None:
        return result
    if response.finish_reason == "content_filter" or _APOLOGY.match(final):
        return _error("refusal", "the model refused")
    if response.finish_reason == "error" or _SERVER_ERROR.match(final):
        return _error("server_error", "it is a server's error message")
    if was_cut:
        return _error("truncated", "the length limit cut the answer before any value")
    return _error("not_json", "there is no JSON value in it")


def _error(kind: str, detail: str) -> ParseResult:
    return ParseResult(None, kind, detail=detail)


#: What hosts say when they stopped the model: the limit, or an abort.
_CUT_REASONS = ("length", "max_tokens", "abort")
_HTML = re.compile(
    r"(?:<!--(?:[^-]++|-(?!->))*+-->\s*+)*+<(?:!doctype|html|head|body|title|center|h1|\?xml)\b",
    re.I | re.S,
)
_APOLOGY = re.compile(
    r"[\s*_>#]*+(?:(?:i['\u2019]m|i am|we['\u2019]re|we are)? ?(?:very |really |so )?"
    r"(?:sorry|afraid|unable|not able)\b|i apologi[sz]e|my apologies"
    r"|(?:unfortunately|however|but|sorry)?,? ?(?:i|we) (?:can['\u2019]?t|cannot|can not"
    r"|won['\u2019]?t|will not|must decline|decline|refuse|am unable|am not able)\b"
    r"|as an ai\b|request (?:declined|refused|denied))",
    re.IGNORECASE,
)
_SERVER_ERROR = re.compile(
    r"\s*+(?:(?:http )?(?:error )?5\d\d\b|internal server error|bad gateway|gateway time-?out"
    r"|service (?:temporarily )?unavailable|upstream (?:connect|request)|(?:server )?error:"
    r"|too many requests|rate limit)",
    re.IGNORECASE,
)
#: Drops that are told in a detail.
_SHOWN = 10
#: Of several failures the one that says most about what to do is reported.
_PRECEDENCE = ("server_error", "ambiguous", "all_dropped", "truncated", "refusal", "schema")


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Something that may be the answer: the items of a list, or objects of ``OF_ONE``."""

    items: Sequence[Any] = ()
    is_cut: bool = False
    error: str = ""  # a kind: it is not the answer
    detail: str = ""


def _candidates(
    schema: Schema, value: Any, *, wraps: int = 1, codes: int = 1
) -> Iterator[_Candidate]:
    """What ``value`` offers as answers, in order.

    Args:
      schema: the schema of the call.
      value: as ``repair`` reads it.
      wraps: single-key wrappers that may still be taken off.
      codes: levels of string encoding that may still be taken off.
    """
    key = ITEMS_KEY.get(schema, "")
    if isinstance(value, str) and codes:
        value, codes = next(iter(_decoded(value)), None), 0
    is_cut = isinstance(value, CutDict | CutList)
    if isinstance(value, list):
        answers = [item for item in value if isinstance(item, dict) and key in item]
        if schema in OF_ONE:
            yield _Candidate(value, is_cut)
        elif answers and len(answers) == len(value):
            for answer in answers:
                yield from _candidates(schema, answer, wraps=wraps, codes=codes)
        elif schema == "tasks" and (not value or any(isinstance(v, dict | str) for v in value)):
            yield _Candidate(value, is_cut)
        else:
            yield _Candidate(error="schema", detail=f"the list stands outside {key!r}")
        return
    if not isinstance(value, dict):
        yield _Candidate(error="schema", detail="it is neither an object nor a list")
        return
    items = value.get(key)
    if isinstance(items, str) and codes:
        items = next(iter(_decoded(items)), None)
    inner = next(iter(value.values())) if len(value) == 1 else None
    if key and isinstance(items, list):
        yield _Candidate(items, is_cut or isinstance(items, CutList))
    elif error := _reported(value):
        yield _Candidate(error=error, detail="it is a report of an error")
    elif wraps and (isinstance(inner, dict | list) or (isinstance(inner, str) and _decoded(inner))):
        for candidate in _candidates(schema, inner, wraps=0, codes=codes):
            yield dataclasses.replace(candidate, is_cut=candidate.is_cut or is_cut)
    elif schema in OF_ONE:
        yield _Candidate([value], is_cut)
    elif is_cut:
        yield _Candidate(error="truncated", detail=f"it ends before {key!r}")
    else:
        yield _Candidate(error="schema", detail=f"{key!r} is missing or no list")


def _decoded(text: str) -> list[Any]:
    """The value that a string encodes, as a list of it; nothing if it is no such string."""
    if not text.lstrip().startswith(("{", "[")):
        return []
    try:
        return [strict(text)]
    except ValueError:
        return [found.value for found in values(text)]


def _reported(value: Mapping[str, Any]) -> str:
    """The error kind of an object that reports an error instead of an answer, or ""."""
    if set(value) == {"refusal"}:
        return "refusal"
    is_report = "error" in value or value.get("object") == "error" or set(value) == {"detail"}
    return "server_error" if is_report else ""


@dataclasses.dataclass(frozen=True)
class _Judging:
    """Checks what may be the answer of one call."""

    schema: Schema
    context: Context
    judge: Judge | None

    def best(self, found: Sequence[Any]) -> ParseResult | None:
        """The last complete valid value of ``found``, else the last cut one, else an error.

        An empty value never comes before one with items.  None if nothing was found.
        """
        candidates = [c for value in found for c in _candidates(self.schema, value)]
        candidates.sort(key=lambda candidate: not candidate.is_cut)  # stable: complete ones last
        errors, empty = [], None
        for candidate in reversed(candidates):
            result = self._read(candidate)
            if result.error:
                errors.append(result)
            elif self.schema in OF_ONE or (result.value and result.value[ITEMS_KEY[self.schema]]):
                return result
            else:
                empty = empty or result
        if empty is not None or not errors:
            return empty
        return min(errors, key=lambda result: _PRECEDENCE.index(result.error))

    def _read(self, candidate: _Candidate) -> ParseResult:
        if candidate.error:
            return _error(candidate.error, candidate.detail)
        if self.schema in OF_ONE:
            return self._whole(candidate)
        whole: list[tuple[int, dict[str, Any]]] = []
        drops: list[Drop] = []
        unknown: list[str] = []
        for index, item in enumerate(candidate.items):
            if isinstance(item, str):
                item = next(iter(_decoded(item)), item)
            if isinstance(item, CutDict | CutList):
                drops.append(Drop(index, "cut", "it was cut"))
            elif item is BROKEN:
                drops.append(Drop(index, "broken", "it is no JSON"))
            else:
                if self.schema == "analysis":
                    unknown += unknown_ids(item, self.context)
                try:
                    whole.append((index, read_object(self.schema, item, self.context)))
                except Invalid as error:
                    drops.append(Drop(index, error.reason, error.detail))
        if self.schema == "tasks":
            whole = self._proven(whole, drops)
        limit = self.context.max_items
        drops += [_too_many(index, limit) for index, _ in whole[limit:]]
        kept = [item for _, item in whole[:limit]]
        drops.sort(key=lambda drop: drop.index)
        kind = ""
        if not kept and any(drop.reason != "cut" for drop in drops):
            kind = "all_dropped"
        elif not kept and candidate.is_cut:
            kind = "truncated"
        elif not kept and self.schema == "tasks":
            kind = "schema"
        value = None if kind else {ITEMS_KEY[self.schema]: kept}
        detail = "; ".join(f"item {drop.index}: {drop.detail}" for drop in drops[:_SHOWN])
        return ParseResult(value, kind, tuple(drops), tuple(unknown), detail)

    def _whole(self, candidate: _Candidate) -> ParseResult:
        """All or nothing: one object, or several that are the same."""
        if candidate.is_cut:
            return _error("truncated", f"the {self.schema} was cut")
        found = []
        for item in candidate.items:
            try:
                found.append(read_object(self.schema, item, self.context))
            except Invalid as error:
                return _error("schema", error.detail)
        if not found:
            return _error("schema", f"the list of {self.schema}s is empty")
        if any(value != found[0] for value in found):
            return _error("ambiguous", f"there are different {self.schema}s in one list")
        return ParseResult(found[0])

    def _proven(
        self, items: Iterable[tuple[int, dict[str, Any]]], drops: list[Drop]
    ) -> list[tuple[int, dict[str, Any]]]:
        """The new tasks that prove themselves, at most ``max_items`` of them; adds to ``drops``.

        A prompt that comes again gets its chance if the task before it was not kept.
        """
        existing = frozenset(_folded(tuple(self.context.existing_prompts)))
        reserved = _phrases(tuple(self.context.eval_prompts))
        queues: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {}  # prompt -> distinct items
        for index, item in items:
            folded, text = _fold(item["prompt"]), json.dumps(item)
            if folded in existing:
                drops.append(Drop(index, "existing", "its prompt exists already"))
            elif reserved.found_in(folded):
                drops.append(Drop(index, "leak", "its prompt is not allowed"))
            elif text in queues.setdefault(folded, {}):
                drops.append(_repeat(index))
            else:
                queues[folded][text] = (index, item)
        kept: list[tuple[int, dict[str, Any]]] = []
        while queues and len(kept) < self.context.max_items:
            prompts = list(queues)[: self.context.max_items - len(kept)]
            wave = [queues[prompt].pop(next(iter(queues[prompt]))) for prompt in prompts]
            complaints = prove([item for _, item in wave], self.judge)
            for prompt, (index, item), complaint in zip(prompts, wave, complaints, strict=True):
                if complaint is None:
                    kept.append((index, item))
                    drops += [_repeat(other) for other, _ in queues.pop(prompt).values()]
                else:
                    drops.append(Drop(index, complaint.reason, complaint.detail))
                    if not queues[prompt]:
                        del queues[prompt]
        left = [index for queue in queues.values() for index, _ in queue.values()]
        drops += [_too_many(index, self.context.max_items) for index in left]
        return sorted(kept, key=lambda entry: entry[0])


def _repeat(index: int) -> Drop:
    return Drop(index, "repeat", "its prompt came before")


def _too_many(index: int, limit: int) -> Drop:
    return Drop(index, "too_many", f"over {limit} items")


def _fold(prompt: str) -> str:
    return fold(prompt) or prompt  # a prompt of signs alone is compared as it is


@functools.lru_cache(maxsize=8)
def _folded(prompts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_fold(prompt) for prompt in prompts)


@functools.lru_cache(maxsize=8)
def _phrases(prompts: tuple[str, ...]) -> Phrases:
    return Phrases(_folded(prompts))
