r"""Finds the final answer in a completion: the one extractor for data, reward and evaluation.

Forms, in the order in which they are looked for:

  boxed       ``\boxed{x}`` or ``\fbox{x}``, the last one; if that is empty or unclosed there is
              no answer, nor if "or", "and" or a comma joins it to a box of another value
  answer_tag  ``<answer>x</answer>``, the last one; likewise
  hashes      a line ``#### x`` (the form of GSM8K's worked solutions, arXiv:2110.14168)
  phrase      "the answer is x", "Answer: x"; the last one that is followed by a value
  bare        the final answer is one value and nothing else
  number      the last number of the text: the lenient fallback

Only what follows the reasoning is read: the harmony ``final`` channel, the text after ``</think>``.
Alternatives ("3 or 4") are no answer.  Nothing is repaired or completed: a value that the length
limit may have cut does not count.  Work is linear in the length of the text.

A chat template that opens the think block inside the prompt leaves no trace of it in a completion
that was cut before ``</think>``: such a draft cannot be told from an answer here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

#: Raised with every change of what is extracted, answers and programs; recorded beside evaluations.
EXTRACTOR_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What was found.

    Attributes:
      answer: the student's answer as written; "" when there is none.
      method: one of ``METHODS``; "" when there is no answer.
      category: "" when there is an answer, else "no_answer" or "truncated".
    """

    answer: str
    method: str
    category: str = ""


def extract_answer(text: str, finish_reason: str = "stop") -> Extraction:
    """The final answer of ``text``, the completion as the student emitted it.

    Args:
      text: any string.
      finish_reason: "stop", or "length" when the token limit cut the completion.

    Returns:
      The answer with its form; or no answer, with the category "truncated" when the length limit
      cut the completion and "no_answer" otherwise.
    """
    was_cut = finish_reason == "length"
    nothing = Extraction("", "", "truncated" if was_cut else "no_answer")
    final = final_text(text)
    for method, find in _FINDERS.items():
        span = find(final)
        if span is None:
            continue
        answer = final[slice(*span)].strip()
        # Only the closing mark of a box or a tag proves that the value is whole.
        may_be_cut = was_cut and method not in ("boxed", "answer_tag")
        if may_be_cut and final[span[1] :] in ("", ".", ","):
            return nothing
        if not answer or (_ALTERNATIVES.search(answer) and not _is_union(answer)):
            return nothing
        return Extraction(answer, method)
    return nothing


_HARMONY_CHANNEL = "<|channel|>"
_HARMONY_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
# A mark right behind a quote that is closed on the line is a string of a program or a mention.
_THINK = re.compile(r"""(?P<quote>["'`])</?think>[^"'`\n]*(?P=quote)|(?P<mark></?think>)""")
_HARMONY_END = re.compile(r"<\|(?:end|return|start|call|channel)\|>")
_END_TOKENS = (
    *(f"<|{name}|>" for name in ("im_end", "endoftext", "end_of_text", "eot_id", "eom_id")),
    *("<|return|>", "<|end|>", "<|pad|>", "</s>", "<eos>", "<pad>", "<end_of_turn>"),
)


def final_text(text: str) -> str:
    """``text`` without reasoning, BOM, carriage returns and closing end-of-text tokens.

    It is empty if the text holds reasoning alone.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if _HARMONY_CHANNEL in text:
        headers = list(_HARMONY_FINAL.finditer(text))
        if not headers:
            return ""
        text = _HARMONY_END.split(text[headers[-1].end() :], maxsplit=1)[0]
    text = _without_end_tokens(text)
    marks = [m for m in _THINK.finditer(text) if m["mark"]]
    ends = [m.end() for m in marks if m["mark"] == "</think>"]
    start = ends[-1] if ends else 0
    has_draft = any(m.start() >= start for m in marks)
    return "" if has_draft else text[start:]


def _without_end_tokens(text: str) -> str:
    end = stop = len(text)
    while True:
        while stop and text[stop - 1].isspace():
            stop -= 1
        if not text.endswith(_END_TOKENS, 0, stop):
            return text[:end]
        end = stop = text.rindex("<", 0, stop)


# Half-open range of characters.  An empty one says: the form is there, but holds no answer.
Span = tuple[int, int]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$\\()]*(?:,|;|,?\s*(?:or|and|and/or)\b)[\s$\\()]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MAX_JOINT = 40


def _boxed(text: str) -> Span | None:
    span: Span | None = None
    position, is_alternative = 0, False
    while match := _BOX.search(text, position):
        end = _closing_brace(text, match.end())
        if end is None:
            return (len(text), len(text))
        is_joined = match.start() - position <= _MAX_JOINT and bool(
            _BETWEEN_BOXES.fullmatch(text, position, match.start())
        )
        is_other = (
            span is not None and text[slice(*span)].strip() != text[match.end() : end].strip()
        )
        is_alternative = is_joined and (is_alternative or is_other)
        span, position = (match.end(), end), end + 1
    if is_alternative:
        return (len(text), len(text))
    if span and (inner := _BOX.search(text, *span)) and not text[span[0] : inner.start()].strip():
        end = _closing_brace(text, inner.end())
        if end is not None and not text[end + 1 : span[1]].strip():
            return (inner.end(), end)
    return span


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group that was opened just before ``start`` closes."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _answer_tag(text: str) -> Span | None:
    start = text.rfind("<answer>")
    if start < 0:
        return None
    start += len("<answer>")
    end = text.find("</answer>", start)
    if end < 0:
        return (len(text), len(text))
    phrase = _PHRASE.search(text, start, end)
    return (phrase.end(), end) if phrase else (start, end)


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_FRACTION = r"\\[dt]?frac\{[0-9.]+\}\{[0-9.]+\}"
# Atomic: the commas of "1,000,000" could part numbers, and the "and" of "1 and 2" be a unit.
_UNSIGNED = rf"(?>(?:{_DIGITS})?{_FRACTION}|(?:{_DIGITS})(?:/[0-9]+)?)"
_SIGNED = rf"[-\u2212+]?{_UNSIGNED}"
_UNIT = r"(?: ?\\?%|(?: ?(?:square|cubic))? ?\u00b0?[A-Za-z]+(?:[\^/][A-Za-z0-9]+)*)"
_PLAIN = rf"(?>[-\u2212+]?[$\u20ac\u00a3]?{_UNSIGNED}{_UNIT}?)"
_NAME = r"[A-Za-z]\w? ?= ?"
_VALUE = re.compile(
    rf"(?:{_NAME})?{_PLAIN}(?:(?:, ?|; ?|,? and | ){_PLAIN})*"
    rf"|[(\[{{]{_SIGNED}(?:, ?{_SIGNED})*[)\]}}]"
)
_LEADING_NUMBER = re.compile(
    rf"(?:{_NAME})?[$\u20ac\u00a3]?{_SIGNED}(?: ?\\?%)?(?:(?:, | and |, and ){_SIGNED})*"
    r"(?![\w.^!*/+]| ?[\\{|^*/+:]| ?[(\[](?![A-Za-z]{2}))"
)
_MATHS = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\((.{1,999}?)\\\)|\\\[((?s:.{1,999}?))\\\]")
# Words are prose, but for the names of functions and those in \text{...}.
_SHORT = (
    r"(?!(?i:i|a|an|as|at|be|by|do|he|if|in|is|it|me|my|no|of|on|or|so|to|up|us|we)(?![A-Za-z]))"
    r"[A-Za-z]{1,2}(?![A-Za-z])"
)
_SYMBOLS = (
    "\u2212\u00b0\u00b1\u00b2\u00b3\u00b7\u00d7\u00f7\u03c0\u221a\u221e\u2264\u2265\u2260\u222a"
)
# Atomic, since ``\sqrt`` and ``\text{cm}`` could be read in pieces as well.
_EXPRESSION = re.compile(
    r"(?:[A-Za-z]\w? ?= ?)?(?>\\(?:text|mathrm) ?\{[^{}]*\}|\\[A-Za-z]+|\\[^A-Za-z]"
    r"|(?:sqrt|pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])"
    rf"|{_SHORT}|[ !$%&'()*+,./0-9;<>^_`{{|}}~\[\]-]|[{_SYMBOLS}])+"
)
_MAX_EXPRESSION = 300
_SIGN_OF_MATHS = re.compile(r"[0-9\\^=<>(\[{]")
_WORD = re.compile(r"\S{1,64}|no (?:real )?solutions?|all real numbers|does not exist")
_MARKS = " \t\n*_`\"'"
_SENTENCE_END = re.compile(r"[.!?;](?=\s|[*_`]*\Z)|\n")
_ALTERNATIVES = re.compile(
    r"(?<![A-Za-z])(?:or|either|maybe|perhaps|possibly)(?![A-Za-z])|\\lor(?![A-Za-z])|\\vee"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_INEQUALITY = re.compile(r"[<>\u2264\u2265]|\\(?:leq?|geq?|lt|gt)(?![A-Za-z])")
_HASHES = re.compile(r"^[ \t]*####([^#\n]*)$", re.MULTILINE)
_PHRASE = re.compile(r"\banswers?(?: (?:is|are)\b:?|:\**| =)", re.IGNORECASE)
# A number that stands alone, neither the tail of a name nor of another number; a minus after an
# operand is subtraction, not a sign.
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-\u2212+])?(?<![\w.\\]){_UNSIGNED}(?![0-9])(?: ?\\?%)?")
_BETWEEN_ALTERNATIVES = re.compile(r"\W*(?:or|and/or)\W*", re.IGNORECASE)


def _is_union(answer: str) -> bool:
    """Whether "or" joins inequalities, which make one set: ``x < 1 or x > 2``."""
    return all(_INEQUALITY.search(part) for part in _ALTERNATIVES.split(answer))


def _hashes(text: str) -> Span | None:
    found = None
    for match in _HASHES.finditer(text):
        if _ALTERNATIVES.search(match[1]):
            found = (len(text), len(text))
        else:  # "#### Step 1" is a Markdown heading and no value
            found = _value(text, *match.span(1)) or found
    return found


def _phrase(text: str) -> Span | None:
    found, position = None, 0
    while match := _PHRASE.search(text, position):
        start, position = _sentence(text, match.end())
        if _ALTERNATIVES.search(text, start, position):
            found = (len(text), len(text))
            continue
        for again in _PHRASE.finditer(text, start, position):
            start = again.end()
        found = _value(text, start, position) or found
    return found


def _sentence(text: str, start: int) -> Span:
    """What follows up to the end of the sentence; of a line of its own, up to the end of the line.

    Formulas are stepped over: they may hold line ends and exclamation marks.
    """
    begin = start
    while begin < len(text) and text[begin] in _MARKS:
        begin += 1
    maths = _MATHS.match(text, begin)
    inside = maths.end() if maths else begin
    if "\n" in text[start:begin]:
        stop = text.find("\n", inside)
        stop = len(text) if stop < 0 else stop
        while stop > inside and text[stop - 1] in "." + _MARKS:
            stop -= 1
        return begin, stop
    found = _SENTENCE_END.search(text, inside)
    return begin, found.start() if found else len(text)


def _bare(text: str) -> Span | None:
    start, end = _trim(text, 0, len(text))
    if end > start and text[end - 1] == ".":
        end -= 1
    maths = _MATHS.fullmatch(text, start, end)
    if maths:
        return maths.span(maths.lastindex or 0)
    return (start, end) if _is_value(text, start, end) else None


def _is_value(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` is one value and nothing else: plain, a word, or a formula."""
    if _VALUE.fullmatch(text, start, end) or _WORD.fullmatch(text, start, end):
        return True
    return end - start <= _MAX_EXPRESSION and bool(
        _EXPRESSION.fullmatch(text, start, end) and _SIGN_OF_MATHS.search(text, start, end)
    )


def _number(text: str) -> Span | None:
    last = before = None
    for match in _NUMBER.finditer(text):
        before, last = last, match
    if last is None:
        return None
    if before and _BETWEEN_ALTERNATIVES.fullmatch(text, before.end(), last.start()):
        return (len(text), len(text))
    return last.span()


def _value(text: str, start: int, end: int) -> Span | None:
    """The value with which ``text[start:end]`` opens, if it does."""
    start, end = _trim(text, start, end)
    maths = _MATHS.match(text, start, end)
    if maths:
        return maths.span(maths.lastindex or 0)
    if _is_value(text, start, end):
        return (start, end)
    number = _LEADING_NUMBER.match(text, start, end)
    return number.span() if number else None


def _trim(text: str, start: int, end: int) -> Span:
    """Without the blanks, quotes and Markdown marks around."""
    while start < end and text[start] in _MARKS:
        start += 1
    while start < end and text[end - 1] in _MARKS:
        end -= 1
    return start, end


_FINDERS: dict[str, Callable[[str], Span | None]] = {
    "boxed": _boxed,
    "answer_tag": _answer_tag,
    "hashes": _hashes,
    "phrase": _phrase,
    "bare": _bare,
    "number": _number,
}

#: The forms in order of precedence.
METHODS = tuple(_FINDERS)
