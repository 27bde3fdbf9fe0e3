"""What can be said of Python code without parsing it: strings, statements, and what is defined.

The code may be anything, so nothing here is compiled, and all work is linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cosr_jax.verifiers.extraction import Span

_LITERAL = re.compile(
    r"""#[^\n]*|(?P<triple>\"{3}|'{3})|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?""", re.DOTALL
)
_TRIPLE_END = {mark: re.compile(rf"\\.|{mark}", re.DOTALL) for mark in ('"""', "'''")}


class Literals:
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


def without_strings(code: str) -> str:
    """``code`` with an empty string for each string, and without comments."""
    pieces, last = [], 0
    literals = Literals(code)
    while span := literals.next(len(code)):
        start, end = span
        pieces += [code[last:start], "" if code[start] == "#" else '""']
        last = end
    return "".join((*pieces, code[last:]))


#: A line that can only be the start of a statement.
STATEMENT = re.compile(
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


def defines(code: str, name: str, imports: bool) -> bool:
    """Whether ``code`` binds ``name`` outside of functions and classes; by an import or else."""
    if name not in code:
        return False
    code = without_strings(code)
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
