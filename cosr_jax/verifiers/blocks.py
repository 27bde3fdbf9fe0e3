"""Finds answers that are more than a value: terms, witnesses, grids, documents.

Forms, in the order in which they are looked for:

  answer_tag  ``<answer>...</answer>``, the last one; an unclosed one is no answer
  fence       the last fenced block, closed or not
  bare        the whole final text

A block inside the tag stands for the tag's content.  As everywhere, only what follows the
reasoning is read, nothing is repaired, and what the length limit may have cut does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cosr_jax.verifiers.extraction import Extraction, final_text

#: The forms in order of precedence.
BLOCK_METHODS = ("answer_tag", "fence", "bare")

# Possessive, so that a line that is no fence is given up after one look.
_FENCE = re.compile(r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^\n`]*+$", re.MULTILINE)


def extract_block(text: str, finish_reason: str = "stop") -> Extraction:
    """The answer's text, as written.

    Args:
      text: the completion as the student emitted it.
      finish_reason: "stop", or "length" when the token limit cut the completion.

    Returns:
      The answer with its form, or no answer with the category "truncated" or "no_answer".
    """
    was_cut = finish_reason == "length"
    nothing = Extraction("", "", "truncated" if was_cut else "no_answer")
    final = final_text(text)
    start = final.rfind("<answer>")
    if start >= 0:
        inside, tag, _ = final[start + len("<answer>") :].partition("</answer>")
        block = last_fence(inside)
        content = (block[0] if block else inside).strip()
        return Extraction(content, "answer_tag") if tag and content else nothing
    block = last_fence(final)
    content, is_whole = block if block else (final, False)
    if not content.strip() or (was_cut and not is_whole):
        return nothing
    return Extraction(content.strip(), "fence" if block else "bare")


def last_fence(text: str) -> tuple[str, bool] | None:
    """Content of the last fenced block that is not empty, and whether it is closed."""
    found = None
    for _, content, is_closed in fences(text):
        found = (content, is_closed)
    return found


def fences(text: str) -> Iterator[tuple[str, str, bool]]:
    """Label, content and whether it is closed, of each fenced block that is not empty."""
    mark, label, start = "", "", 0
    for line in _FENCE.finditer(text):
        if not mark:
            mark, label, start = line[1], line[2].lower(), line.end()
        elif line[1].startswith(mark) and not line[2]:
            if content := text[start : line.start()].strip():
                yield label, content, True
            mark = ""
    if mark and (content := text[start:].strip()):
        yield label, content, False
