r"""Finds the program in a completion: the one extractor for data, reward and evaluation.

Sources, in the order in which they are asked for the entry point:

  1. fenced blocks (backticks or tildes, closed or not); the last that defines the entry point
  2. stretches of code between paragraphs of prose, outside of all fences; likewise
  3. blocks that are labelled as another language

An import of the name counts where nothing else binds it: a usage example imports it, too.

If nothing defines it, the last Python block is the program, which then fails for the lack of its
entry point.  For a script the last block that reads standard input counts, else the last Python
block.  Blocks of shells, consoles, outputs and data are never programs.

Nothing is repaired: the program is a stretch of the text, from the start of a line to the end of
one, without the indentation or quotation marks of its fence.  Nothing of it is executed, and only
code that the length limit cut is parsed, to tell whether it is whole.  Work is linear in the length
of the text.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence

from cosr_jax.verifiers.extraction import Span, final_text


@dataclasses.dataclass(frozen=True)
class CodeExtraction:
    """What was found.

    Attributes:
      code: the student's program as written; "" when there is none.
      category: "" when there is a program, else "no_code" or "truncated".
    """

    code: str
    category: str = ""


def extract_code(text: str, entry_point: str | None, finish_reason: str = "stop") -> CodeExtraction:
    """The program of ``text``, the completion as the student emitted it.

    Args:
      text: any string.
      entry_point: the name that the program must define; None or "" for a script.
      finish_reason: "stop", or "length" when the token limit cut the completion.

    Returns:
      The program; or none, with the category "truncated" when the length limit cut the completion
      before the program was whole and "no_code" otherwise.
    """
    was_cut = finish_reason == "length"
    name = entry_point.partition(".")[0].partition("(")[0].strip() if entry_point else ""
    final = final_text(text)
    for region in _regions(final):
        block = _choose(final[slice(*region)], name)
        if block is None:
            continue
        if was_cut and not block.is_closed and not _parses(block.code):
            return CodeExtraction("", "truncated")
        return CodeExtraction(block.code)
    return CodeExtraction("", "truncated" if was_cut else "no_code")


@dataclasses.dataclass(frozen=True)
class _Block:
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
_NO_PROGRAMS = frozenset(_SHELLS_AND_DATA.split())
_FOREIGN = frozenset(_OTHER_LANGUAGES.split())
_PYTHON = re.compile(r"i?py(?:thon|py)?[-0-9.]*|sage|tool_code")
_READS_STDIN = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(\s*0\b|\bos\.read\(\s*0\b|\bfileinput\b")


def _choose(text: str, name: str) -> _Block | None:
    """The block of ``text`` that is the program; ``name`` is its entry point, "" for a script."""
    blocks = _fenced(text)
    fenced = [b for b in blocks if b.label not in _NO_PROGRAMS and b.code.strip()]
    ours = [block for block in fenced if block.label not in _FOREIGN]
    loose = list(_unfenced(text, blocks))
    if name:
        others = [block for block in fenced if block.label in _FOREIGN]
        for imports in (False, True):
            for sources in (ours, loose, others):
                for block in reversed(sources):
                    if _defines(block.code, name, imports):
                        return block
    else:
        for sources in (ours, loose):
            for block in reversed(sources):
                if _READS_STDIN.search(_without_strings(block.code)):
                    return block
    for block in reversed(ours):
        if _PYTHON.fullmatch(block.label):
            return block
    for block in reversed([*loose, *ours]):
        if _STATEMENT.search(_without_strings(block.code)):
            return block
    return None


_MENTION = r"""(?P<quote>["'`])<answer>[^"'`\n]*(?P=quote)"""
_ANSWER = re.compile(rf"{_MENTION}|(?P<open><answer>)")
_ANSWER_END = "</answer>"


def _regions(text: str) -> Iterator[Span]:
    """Where to look for the program: the last <answer>, or all of a text without one.

    Tags inside a closed block, or between quotes, are part of a program.  A tag that is not closed
    may be a mere mention: what stands before it comes next.
    """
    if "<answer>" not in text:
        yield (0, len(text))
        return
    inside = [block.span for block in _fenced(text) if block.is_closed]
    starts = [m.end() for m in _outside(_ANSWER.finditer(text), inside) if m["open"]]
    ends = [m.start() for m in _outside(re.finditer(_ANSWER_END, text), inside)]
    limit = len(text)
    for start in reversed(starts):
        end = next((e for e in ends if start <= e <= limit), None)
        yield (start, limit if end is None else end)
        if end is not None:
            return
        limit = start - len("<answer>")
    yield (0, limit)


def _outside(matches: Iterator[re.Match[str]], spans: Sequence[Span]) -> Iterator[re.Match[str]]:
    """The matches that start in none of ``spans``; both are in order."""
    rest = iter(spans)
    span = next(rest, None)
    for match in matches:
        while span and span[1] <= match.start():
            span = next(rest, None)
        if not span or match.start() < span[0]:
            yield match


# --- Fences ---

_RUN = re.compile(r"`{3,}|^(?P<indent>[ \t]*)~{3,}", re.MULTILINE)
_PREFIX = re.compile(r"[ \t>]*(?:(?:[-*+]|[0-9]{1,3}[.)])[ \t]+)?")
_LABEL = re.compile(
    r"[ \t]*\{?[ \t]*\.?"
    r"((?:python3?|py)(?=(?:def|class|import|from|async) )|[A-Za-z][\w+#.-]*)"
)
_OPENS_INLINE = re.compile(r"[ \t]*(?:def|class|import|from|async def)[ \t]+\w+|[ \t]*print\(")
_NOTHING = re.compile(r"[ \t]*(?:(?:<\|\w+\|>|</s>)[ \t]*)*(?:</answer>.*)?")


def _fenced(text: str) -> list[_Block]:
    """All fenced blocks, in order."""
    blocks: list[_Block] = []
    literals = _Literals(text)
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

    def __init__(self, text: str, literals: _Literals, start: int, end: int, line_end: int):
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
        may_be_python = not (self.label in _NO_PROGRAMS or self.label in _FOREIGN)
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

    def block(self, start: int, end: int, is_closed: bool) -> _Block:
        """What stands between this fence and the marks at ``start``."""
        line_start = self._text.rfind("\n", 0, start) + 1
        stop = start
        if _PREFIX.fullmatch(self._text, line_start, start):
            stop = max(line_start, min(self._content, start))
        code = self._text[self._content : stop].removeprefix("\ufeff")
        opening = self._text[self._line_start : self._start]
        if opening and _PREFIX.fullmatch(opening):
            code = _without_margin(code, opening)
        return _Block(self.label, code, is_closed, (self._start, end))


def _is_known(label: str) -> bool:
    return bool(label in _NO_PROGRAMS or label in _FOREIGN or _PYTHON.fullmatch(label))


def _without_margin(code: str, opening: str) -> str:
    """Without what its fence's indentation, list item or quotation put before each line."""
    margin = re.sub(r"[^>\s]", " ", opening)
    if not code.lstrip("\n").startswith(margin):
        return code
    mark = re.escape(margin.rstrip())
    blanks = len(margin) - len(margin.rstrip())
    return re.sub(rf"^{mark}[ \t]{{0,{blanks}}}", "", code, flags=re.MULTILINE)


# --- Strings and comments ---

_LITERAL = re.compile(
    r"""#[^\n]*|(?P<triple>\"{3}|'{3})|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?""", re.DOTALL
)
_TRIPLE_END = {mark: re.compile(rf"\\.|{mark}", re.DOTALL) for mark in ('"""', "'''")}


class _Literals:
    """Strings and comments of a text, read on demand.

    A triple quote that is never closed opens no string.
    """

    def __init__(self, text: str):
        self._text = text
        self._never_closed: set[str] = set()
        self.restart(0)

    def restart(self, position: int) -> None:
        """Reads on from ``position``, which lies in no string."""
        self._span: Span = (position, position)

    def cover(self, position: int) -> bool:
        """Whether ``position`` lies in one; positions must not decrease."""
        while self._span[1] <= position:
            span = self.next(position)
            if span is None:
                self._span = (position, position)
                return False
        return self._span[0] < position

    def next(self, stop: int) -> Span | None:
        """The next one that starts before ``stop``."""
        start = self._span[1]
        while found := _LITERAL.search(self._text, start, stop):
            mark = found["triple"]
            if mark is None:
                match = _LITERAL.match(self._text, found.start())
                assert match
                self._span = match.span()
                return self._span
            start = found.end()
            end = self._triple_end(mark, start)
            if end:
                self._span = (found.start(), end)
                return self._span
        return None

    def _triple_end(self, mark: str, start: int) -> int:
        if mark not in self._never_closed:
            for end in _TRIPLE_END[mark].finditer(self._text, start):
                if end[0] == mark:
                    return end.end()
            self._never_closed.add(mark)
        return 0


def _without_strings(code: str) -> str:
    """``code`` with an empty string for each string, and without comments."""
    pieces, last = [], 0
    literals = _Literals(code)
    while span := literals.next(len(code)):
        start, end = span
        pieces += [code[last:start], "" if code[start] == "#" else '""']
        last = end
    return "".join((*pieces, code[last:]))


# --- Code ---

_STATEMENT = re.compile(
    r"""
    ^(?:(?:async[ ]+)?def[ ]+\w+[ ]*[(\[]
    | class[ ]+\w+[ ]*[(:\[]
    | @[A-Za-z_]
    | import[ ]+[\w.]+(?:[ ]+as[ ]+\w+)?(?:[ ]*,[ ]*[\w.]+(?:[ ]+as[ ]+\w+)?)*[ ]*(?:;.*)?$
    | from[ ]+[\w.]+[ ]+import\b
    | (?:if|for|while|with|match|async[ ]+for|async[ ]+with)\b.*:[ ]*$
    | (?:if|for|while|with)\b.*:[ ]*[\w.]+(?:[ ]*[-+*/]?=|\(|[ ]*$)
    | try[ ]*:
    | [A-Za-z_][\w.]*(?:\[[^\n]*\])?(?:[ ]*,[ ]*\*?[\w.]+)*[ ]*(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)
    | [A-Za-z_]\w*[ ]*:[ ]*[A-Za-z_][^=\n]*=(?!=)
    | [A-Za-z_][\w.]*\(
    )
    """,
    re.MULTILINE | re.VERBOSE,
)
_MAX_TARGETS = 200
_SCOPE = re.compile(
    r"^([ \t]*)(?:(?P<scope>(?:async[ \t]+)?def|class)|if|elif|else|try|except|finally|with|for"
    r"|while|match|case|async)\b",
    re.MULTILINE,
)


def _defines(code: str, name: str, imports: bool) -> bool:
    """Whether ``code`` binds ``name`` outside of functions and classes; by an import or else."""
    if name not in code:
        return False
    code = _without_strings(code)
    word = re.escape(name)
    bound = re.compile(
        rf"""^(?P<indent>[ \t]*)(?:
          (?:async[ \t]+)?def[ \t]+{word}\b
        | class[ \t]+{word}\b
        | (?P<imported>(?:from[ \t]+[\w.]+[ \t]+)?import\b)
          (?:[^\n(]*?|[ \t]*\([^()]*?)\b{word}\b(?![ \t]+as\b)
        | (?P<assigned>(?=[^\n(]{{0,{_MAX_TARGETS}}}\b{word}\b)[\w \t]*[,=:])
        )""",
        re.MULTILINE | re.VERBOSE,
    )
    target = re.compile(
        rf"[ \t]*(?:\w+[ \t]*[,=][ \t]*)*{word}[ \t]*(?:(?:,[ \t]*\w*[ \t]*)*|:[^=\n]*)=(?!=)"
    )
    depth = last = 0
    indented = []
    for match in bound.finditer(code):
        if bool(match["imported"]) != imports:
            continue
        if match["assigned"]:
            line = code[match.start() : match.end() + 2 * _MAX_TARGETS].partition("\n")[0]
            if not target.match(line):
                continue
            between = code[last : match.start()]
            depth += sum(map(between.count, "([{")) - sum(map(between.count, ")]}"))
            last = match.start()
            if depth > 0:  # a keyword argument
                continue
        if not match["indent"]:
            return True
        indented.append(match)
    return bool(indented) and _any_outside_scopes(code, indented)


def _any_outside_scopes(code: str, matches: Sequence[re.Match[str]]) -> bool:
    """Whether a match stands under nothing but "if", "try" and their kind."""
    heads = [(m.start(), len(m[1].expandtabs()), bool(m["scope"])) for m in _SCOPE.finditer(code)]
    rest = iter(heads)
    head = next(rest, None)
    enclosing: list[tuple[int, bool]] = []
    for match in matches:
        while head and head[0] < match.start():
            enclosing = _enclosing(enclosing, head[1])
            enclosing.append((head[1], head[2]))
            head = next(rest, None)
        enclosing = _enclosing(enclosing, len(match["indent"].expandtabs()))
        if enclosing and not any(is_scope for _, is_scope in enclosing):
            return True
    return False


def _enclosing(heads: list[tuple[int, bool]], indent: int) -> list[tuple[int, bool]]:
    while heads and heads[-1][0] >= indent:
        heads.pop()
    return heads


def _parses(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the student's invalid escapes are nobody's concern here
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
    return True


# --- Code among prose ---

_BULLET = re.compile(r"[ \t]*(?:[-*\u2022]|[0-9]+[.)])[ \t]+[*_`]*[A-Za-z]+[^\w\s(=]* [A-Za-z]")
_WORDS = re.compile(
    r"(?!(?:assert|await|del|global|lambda|nonlocal|not|pass|raise|return|yield|elif|else|except"
    r"|finally|if|for|while|with|case|match|import|from|class|def|async)\b)"
    r"[*_`>#\"'(]*[A-Za-z][A-Za-z'\u2019-]*[,:.!]?[*_`\"']*(?:[ ]+[\w*`\"'(\u2019]|[ ]*$)"
)
_DOCSTRINGS = ('"""', "'''", 'r"""', "r'''")


_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?:(?: {4}|\t)[^\n]*(?:\n|\Z)|\n)+")


def _unfenced(text: str, fenced: Sequence[_Block]) -> Iterator[_Block]:
    """Stretches of code between prose, outside of ``fenced``."""
    position = 0
    for start, end in (*(block.span for block in fenced), (len(text), len(text))):
        between = text[position:start]
        yield from _indented(between)
        yield from _stretches(between)
        position = end


def _indented(text: str) -> Iterator[_Block]:
    """Code that Markdown sets off by indentation alone: behind a blank line or at the start."""
    for match in _INDENTED.finditer(text):
        code = re.sub(r"^(?: {4}|\t)", "", match[0], flags=re.MULTILINE)
        if _STATEMENT.match(code.lstrip("\n")):
            yield _Block("", code, match.end() < len(text), match.span())


def _stretches(text: str) -> Iterator[_Block]:
    """Code between prose: from a line that can only be a statement to the next line of prose."""
    if not _STATEMENT.search(text):
        return
    start: int | None = None
    comments: int | None = None  # where those right before the code start
    position = 0
    literals = _Literals(text)
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if start is None:
            if line.startswith("#"):
                comments = position if comments is None else comments
            elif _STATEMENT.match(line) or line.startswith(_DOCSTRINGS):
                start = position if comments is None else comments
                literals.restart(position)
            elif line.strip():
                comments = None
        elif _is_prose(line) and not literals.cover(position):
            yield _Block("", text[start:position], True, (start, position))
            start = comments = None
        position += len(line)
    if start is not None:
        yield _Block("", text[start:], False, (start, position))


def _is_prose(line: str) -> bool:
    if _BULLET.match(line):
        return True
    return bool(not line[:1].isspace() and _WORDS.match(line) and not _STATEMENT.match(line))
