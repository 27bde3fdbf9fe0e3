"""Fenced blocks of a text, as students write them: unclosed, nested, indented, quoted, in one line.

CommonMark's rules, but for three: a fence in a string or comment of Python code closes nothing, one
outside of them closes it whatever follows on the line, and a labelled fence inside a block that
nobody closed opens the next block.
"""

from __future__ import annotations

import dataclasses
import re

from cosr_jax.verifiers.extraction import Span
from cosr_jax.verifiers.python_text import Literals


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of a text that may be a program."""

    label: str  # the language as written, in lower case; "" for none
    code: str
    is_closed: bool
    span: Span  # with the fences


_SHELLS_AND_DATA = """
    bash sh shell zsh fish console terminal cmd bat powershell ps1 shell-session sh-session pycon
    doctest output stdout stderr stdin out input result results traceback error log json jsonl yaml
    yml toml ini csv xml diff patch
"""
_OTHER_LANGUAGES = """
    text txt plaintext plain md markdown html css js javascript ts typescript jsx tsx java kotlin
    c cpp c++ cxx cs csharp c# go golang rust rs ruby rb php perl swift scala haskell hs lua r julia
    matlab sql latex tex math mermaid dot makefile cmake dockerfile vb pascal fortran lisp clojure
"""
NO_PROGRAMS = frozenset(_SHELLS_AND_DATA.split())
FOREIGN = frozenset(_OTHER_LANGUAGES.split())
PYTHON = re.compile(r"i?py(?:thon|py)?[-0-9.]*|sage|tool_code")
_RUN = re.compile(r"`{3,}|^(?P<indent>[ \t]*)~{3,}", re.MULTILINE)
_PREFIX = re.compile(r"[ \t>]*(?:(?:[-*+]|[0-9]{1,3}[.)])[ \t]+)?")
_LABEL = re.compile(
    r"[ \t]*+\{?+[ \t]*+\.?"
    r"((?:python3?|py)(?=(?:def|class|import|from|async) )|[A-Za-z][\w+#.-]*)"
)
_OPENS_INLINE = re.compile(r"[ \t]*(?:def|class|import|from|async def)[ \t]+\w+|[ \t]*print\(")
_NOTHING = re.compile(r"[ \t]*(?:(?:<\|\w+\|>|</s>)[ \t]*)*(?:</answer>.*)?")


def fenced_blocks(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    blocks: list[Block] = []
    literals = Literals(text)
    fence: _Fence | None = None
    for run in _RUN.finditer(text):
        start = run.end("indent") if run["indent"] is not None else run.start()
        line_end = text.find("\n", run.end())
        line_end = len(text) if line_end < 0 else line_end
        if fence is None:
            fence = _Fence(text, literals, start, run.end(), line_end)
        elif fence.is_closed_by(start, run.end(), line_end):
            blocks.append(fence.block(start, run.end(), is_closed=True))
            fence = None
        elif fence.is_followed_by(start, run.end(), line_end):
            blocks.append(fence.block(start, start, is_closed=True))
            fence = _Fence(text, literals, start, run.end(), line_end)
    if fence:
        blocks.append(fence.block(len(text), len(text), is_closed=False))
    return blocks


class _Fence:
    """An open fence: its marks, and where its content starts.

    Args:
      text: the whole text.
      literals: its strings and comments.
      start: where the run of marks starts.
      end: where it ends.
      line_end: where its line ends.
    """

    def __init__(self, text: str, literals: Literals, start: int, end: int, line_end: int):
        self._text = text
        self._start = start
        self._mark = text[start]
        self._length = end - start
        self._line_end = line_end
        self._line_start = text.rfind("\n", 0, start) + 1
        label = _LABEL.match(text, end, line_end)
        self.label = label[1].lower() if label else ""
        self._content = line_end + 1
        if label and _is_known(self.label):
            if _OPENS_INLINE.match(text, label.end(), line_end):  # "```python def f(x):"
                self._content = label.end()
                while text[self._content] in " \t":
                    self._content += 1
            elif self._mark in text[end:line_end]:  # "```python f(x)```", all on one line
                self._content = label.end()
        elif self._mark in text[end:line_end] or _OPENS_INLINE.match(text, end, line_end):
            self.label, self._content = "", end
        may_be_python = not (self.label in NO_PROGRAMS or self.label in FOREIGN)
        self._literals = literals if may_be_python else None
        literals.restart(self._content)

    def is_closed_by(self, start: int, end: int, line_end: int) -> bool:
        """Whether the marks at ``start`` close this fence, neither in a string nor in a comment."""
        if start < self._content or not self._fits(start, end):
            return False
        after = _NOTHING.match(self._text, end, line_end)
        if start > self._line_end and (after is None or after.end() < line_end):
            # A line that starts with such marks is no Python, whatever follows them.
            label = _LABEL.match(self._text, end, line_end)
            if not self._literals or (label and _is_known(label[1].lower())):
                return False
            line_start = self._text.rfind("\n", 0, start) + 1
            if not _PREFIX.fullmatch(self._text, line_start, start):
                return False
        return not (self._literals and self._literals.cover(start))

    def is_followed_by(self, start: int, end: int, line_end: int) -> bool:
        """Whether the marks open a new block, so that this one was left unclosed."""
        label = _LABEL.match(self._text, end, line_end)
        if not label or not _is_known(label[1].lower()) or start < self._line_end:
            return False
        line_start = self._text.rfind("\n", 0, start) + 1
        if not _PREFIX.fullmatch(self._text, line_start, start):
            return False
        return not (self._literals and self._literals.cover(start))

    def _fits(self, start: int, end: int) -> bool:
        return self._text[start] == self._mark and end - start >= self._length

    def block(self, start: int, end: int, is_closed: bool) -> Block:
        """What stands between this fence and the marks at ``start``."""
        line_start = self._text.rfind("\n", 0, start) + 1
        stop = start
        if _PREFIX.fullmatch(self._text, line_start, start):
            stop = max(line_start, min(self._content, start))
        code = self._text[self._content : stop].removeprefix("\ufeff")
        opening = self._text[self._line_start : self._start]
        if opening and _PREFIX.fullmatch(opening):
            code = _without_margin(code, opening)
        return Block(self.label, code, is_closed, (self._start, end))


def _is_known(label: str) -> bool:
    return bool(label in NO_PROGRAMS or label in FOREIGN or PYTHON.fullmatch(label))


def _without_margin(code: str, opening: str) -> str:
    """Without what its fence's indentation, list item or quotation put before each line."""
    margin = re.sub(r"[^>\s]", " ", opening)
    if not code.lstrip("\n").startswith(margin):
        return code
    mark = re.escape(margin.rstrip())
    blanks = len(margin) - len(margin.rstrip())
    return re.sub(rf"^{mark}[ \t]{{0,{blanks}}}", "", code, flags=re.MULTILINE)
