"""Which part of a model's text is its answer, and what is reasoning around it.

Hosts leak the frames of the chat format into the text: harmony's channel headers, headers whose
control tokens were stripped ("analysis...assistantfinal..."), think blocks.  What is not the final
answer is a draft, and a draft is never a source of values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cosr_jax.curator.repair import values

_HEADER = re.compile(
    r"""<\|channel\|>\s*(?P<channel>\w*)                                          # as sent
          (?:[^<{\["]{0,200}<\|constrain\|>)?(?:[^<{\["]{0,200}<\|message\|>)?
      | (?:(?<=<\|start\|>)assistant|(?<=<\|end\|>)|\A\s*)                        # <|channel|> gone
          (?P<bare>analysis|commentary|final)(?:\s*json)?\s*<\|message\|>
      | assistant(?P<plain>analysis|commentary|final)                             # all tokens gone
    """,
    re.VERBOSE,
)
#: A whole text that opens in the analysis channel, all control tokens gone.
_PLAIN_ANALYSIS = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z\"'{\[])")
_END = re.compile(r"<\|(?:end|return|call|start|channel|endoftext)\|>")
_THINK = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    """The final answer in ``text``; None if all of it is reasoning.

    With harmony headers only what follows the last header of the final channel counts, up to the
    end of its message; then what follows the last closed think block, if none is open behind it.
    Marks inside the strings of a value are data.
    """
    headers = list(_outside_values(_HEADER, text))
    if headers:
        finals = [
            mark
            for mark in headers
            if (mark["channel"] or mark["bare"] or mark["plain"]) == "final"
        ]
        if not finals:
            return None
        text = text[finals[-1].end() :]
        ends = (*_outside_values(_END, text), *_outside_values(_HEADER, text))
        text = text[: min((mark.start() for mark in ends), default=len(text))]
    elif _PLAIN_ANALYSIS.match(text):
        return None
    thoughts = list(_outside_values(_THINK, text))
    if thoughts and "/" not in thoughts[-1][0]:
        return None
    return text[thoughts[-1].end() :] if thoughts else text


def _outside_values(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The matches in ``text`` that do not stand inside a string of a value.

    Outside a string a mark ends a value that is being read, so those inside its range are data.
    """
    if not pattern.search(text):  # most texts have none
        return
    spans = (
        found for found in values(text) if found.is_closed or (found.is_clean and found.has_member)
    )
    span = next(spans, None)
    for mark in pattern.finditer(text):
        while span and span.end <= mark.start():
            span = next(spans, None)
        if span is None or mark.start() < span.start:
            yield mark
