"""Reads JSON values out of text, strictly or with repairs of syntax, and never invents one.

``strict`` is JSON by the letter.  ``values`` finds the objects and lists in any text and forgives
what leaves no doubt about the values: a BOM, prose and fences around, trailing commas and commas
missing between members, comments, other kinds of quotes and quotes inside a string, names without
quotes as keys, Python's literals, raw newlines in strings, one level of string encoding around the
whole.  What ends before its closing bracket is returned as ``CutDict`` or ``CutList`` with its
whole members; a cut string, number or word is gone.  An object of a list that cannot be read
becomes ``BROKEN`` and the list goes on.

Numbers stay as written (``Number``): what they are is for the schema to say.  The reader keeps its
own stack instead of recursing, and the work is linear in the length of the text.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as it stands in the text."""

    literal: str


class _Unreadable(enum.Enum):
    BROKEN = "broken"


#: Stands where something was that is no JSON value: NaN, a bare word, an object that is broken.
BROKEN = _Unreadable.BROKEN


class CutDict(dict[str, Any]):
    """The whole members of an object that was not closed; the last one may be cut itself."""


class CutList(list[Any]):
    """The whole members of a list that was not closed; the last one may be cut itself."""


def _merged(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members.  The last of equal keys counts, but [] never replaces a list."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not (value == [] and isinstance(result.get(key), list)):
            result[key] = value
    return result


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_STRICT = json.JSONDecoder(
    parse_float=Number, parse_int=Number, parse_constant=_refuse, object_pairs_hook=_merged
)


def strict(text: str) -> Any:
    """The value of ``text``, which is one JSON value with blanks around.

    Raises:
      ValueError: it is something else, or is nested deeper than the interpreter allows.
    """
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclasses.dataclass(frozen=True)
class Found:
    """An object or a list in a text."""

    value: Any  # cut where it was not closed
    start: int
    end: int  # half-open, in characters
    is_closed: bool  # its closing bracket is there
    is_clean: bool  # nothing was skipped


def values(text: str) -> Iterator[Found]:
    """The outermost objects and lists of ``text``, in order.

    A bracket behind which nothing can be read is taken for prose.  Behind a value that broke off
    the next one is looked for where a line opens a fence or a bracket: anything else may stand
    inside a string of the broken one.
    """
    reader = _Reader(text)
    fuel = _EFFORT * len(text)
    first = _START.search(text)
    position = 0
    if first and _ENCODED.match(text, first.start()):
        decoded, position = _decoded(text, first.start())
        for found in values(decoded):
            yield dataclasses.replace(found, start=first.start(), end=position)
    while fuel >= 0 and (match := _START.search(text, position)):
        found = reader.read(match.start())
        fuel -= found.end - found.start
        position = found.end
        if found.is_closed or found.is_clean or reader.has_member:
            yield found
        if found.is_closed or reader.is_too_deep:
            continue
        if reader.has_member:
            again = _RESTART.search(text, position)
            position = again.end() if again else len(text)
        else:
            position = found.start + 1


#: Characters read, per character of a text, before broken beginnings are given up.
_EFFORT = 4
_MAX_DEPTH = 100

_SPACE = r"[\s\ufeff\u200b-\u200d\u2060]"
_BLANK = re.compile(rf"(?:{_SPACE}++|(?://|\#)[^\n]*+|/\*(?:.*?\*/|.*\Z))*+", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?")
_LITERAL = re.compile(r"true|false|null|True|False|None")
_LITERALS = {
    **{"true": True, "false": False, "null": None},
    **{"True": True, "False": False, "None": None},
}
_WORD = re.compile(r"[^\s,:{}\[\]\"'`\u2018-\u201e#]++")
_NAME = re.compile(rf"[A-Za-z_$][\w$-]*+(?={_SPACE}*+:)")
_DELIMITER = re.compile(rf"{_SPACE}|[,}}\]\#]|/[/*]")

#: Opening quote -> the quotes that may close the string.
_QUOTES = {
    **{'"': '"', "'": "'", "`": "`"},
    **{"\u201c": "\u201d\u201c", "\u201d": "\u201d", "\u201e": "\u201c\u201d"},
    **{"\u2018": "\u2019\u2018"},
}
_PLAIN = {quote: re.compile(rf"[^\\{closers}]*+") for quote, closers in _QUOTES.items()}
#: A quote closes its string where the grammar can go on: before a delimiter, a comment, the end,
#: or the next key of an object whose comma is missing.  Elsewhere it belongs to the string.
_AFTER_STRING = re.compile(rf"{_SPACE}*+(?:[,:}}\]\#]|/[/*]|\Z|[\"'][A-Za-z_]\w*+[\"']{_SPACE}*+:)")
#: "a" "b" and "a" + "b": an expression, which nobody evaluates here.
_JOINED = re.compile(rf"{_SPACE}*+\+{_SPACE}*+[\"']|{_SPACE}++[\"']")
_ESCAPES = {
    **{"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"},
    **{"/": "/", "\\": "\\", '"': '"', "'": "'", "`": "`"},
}
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SURROGATES = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")

_START = re.compile(r"[{\[]")
_RESTART = re.compile(r"^(?:[ \t]*```|(?=[{\[]))", re.MULTILINE)
#: What matters outside strings.  An apostrophe behind a letter opens no string.
_STRUCTURE = re.compile(r"[{}\[\],\"\u201c\u201e]|(?<!\w)['`\u2018]")
_CLOSER = {"{": "}", "[": "]"}
#: A value whose own quotes are escaped: encoded as a string once more.
_ENCODED = re.compile(r"[{\[](?:\s|\\[nrt]|[{\[])*+\\\"")
_ENCODED_TEXT = re.compile(r"[^\"\\]*+(?:\\.[^\"\\]*+)*+", re.DOTALL)


class _Broken(Exception):
    """The grammar cannot go on at ``position``."""

    def __init__(self, position: int):
        super().__init__(position)
        self.position = position


class _Cut(Exception):
    """The text ended."""


@dataclasses.dataclass(slots=True)
class _Frame:
    """An object or a list that is still open."""

    closer: str  # "}" or "]"
    expects: str  # "key", "colon", "value" or "comma"
    members: list[Any] = dataclasses.field(default_factory=list)  # of an object: (key, value)
    key: str = ""

    def add(self, value: Any) -> None:
        self.members.append((self.key, value) if self.closer == "}" else value)
        self.expects = "comma"

    def closed(self) -> Any:
        return _merged(self.members) if self.closer == "}" else self.members

    def cut(self) -> Any:
        return CutDict(_merged(self.members)) if self.closer == "}" else CutList(self.members)

    def holds_objects(self) -> bool:
        return any(value is BROKEN or isinstance(value, dict) for value in self.members[-1:])


class _Reader:
    """Reads values of one text."""

    def __init__(self, text: str):
        self._text = text
        self.has_member = False  # the last value read has a key with a colon somewhere
        self.is_too_deep = False

    def read(self, start: int) -> Found:
        """What opens at ``start``."""
        self.has_member = self.is_too_deep = False
        opener = self._text[start]
        stack = [_Frame(_CLOSER[opener], "key" if opener == "{" else "value")]
        position, is_clean = start + 1, True
        while True:
            try:
                position = self._step(stack, position)
            except _Cut:
                position = len(self._text)
                break
            except _Broken as error:
                is_clean = False
                try:
                    position = self._recovered(stack, error.position)
                except _Cut:
                    position = len(self._text)
                    break
                except _Broken:
                    position = error.position
                    break
            if stack[0].expects == "end":
                return Found(stack[0].closed(), start, position, True, is_clean)
        child = stack.pop().cut()
        while stack:
            stack[-1].add(child)
            child = stack.pop().cut()
        return Found(child, start, position, False, is_clean)

    def _step(self, stack: list[_Frame], position: int) -> int:
        """Reads one token; returns where the next one may begin."""
        position = _blank(self._text, position)
        if position == len(self._text):
            raise _Cut
        char, frame = self._text[position], stack[-1]
        is_object = frame.closer == "}"
        if char == frame.closer and frame.expects not in ("colon", "value" if is_object else ""):
            if len(stack) == 1:
                frame.expects = "end"
            else:
                stack.pop()
                stack[-1].add(frame.closed())
            return position + 1
        if char == "," and frame.members and frame.expects != "colon":
            if is_object and frame.expects == "value":
                raise _Broken(position)
            frame.expects = "key" if is_object else "value"
            return position + 1
        if frame.expects == "colon":
            if char != ":":
                raise _Broken(position)
            frame.expects, self.has_member = "value", True
            return position + 1
        if frame.expects == "comma" and not is_object:  # missing, between objects
            if char != "{" or not frame.holds_objects():
                raise _Broken(position)
        elif is_object and frame.expects != "value":
            frame.key, position = self._key(position)
            frame.expects = "colon"
            return position
        if char in _CLOSER:
            if len(stack) == _MAX_DEPTH:
                self.is_too_deep = True
                raise _Broken(position)
            stack.append(_Frame(_CLOSER[char], "key" if char == "{" else "value"))
            return position + 1
        value, position = self._scalar(position)
        frame.add(value)
        return position

    def _key(self, position: int) -> tuple[str, int]:
        if self._text[position] in _QUOTES:
            return self.string(position)
        name = _NAME.match(self._text, position)
        if name is None:
            raise _Broken(position)
        return name[0], name.end()

    def _scalar(self, position: int) -> tuple[Any, int]:
        text = self._text
        if text[position] in _QUOTES:
            return self.string(position)
        for pattern in (_NUMBER, _LITERAL):
            match = pattern.match(text, position)
            if match and match.end() == len(text):
                raise _Cut  # it may go on
            if match and _DELIMITER.match(text, match.end()):
                is_number = pattern is _NUMBER
                return Number(match[0]) if is_number else _LITERALS[match[0]], match.end()
        word = _WORD.match(text, position)
        if word is None:
            raise _Broken(position)
        if word.end() == len(text):
            raise _Cut
        if not _DELIMITER.match(text, word.end()):
            raise _Broken(word.end())
        return BROKEN, word.end()

    def string(self, position: int) -> tuple[str, int]:
        """The string that opens at ``position``, and where it ends."""
        text, quote = self._text, self._text[position]
        if quote in "\"'" and text.startswith(3 * quote, position):
            end = re.compile(rf"[^\\]*?(?:\\.[^\\]*?)*?{3 * quote}", re.DOTALL)
            match = end.match(text, position + 3)
            if match is None:
                raise _Cut
            return _unescaped(match[0][:-3]), match.end()
        start = position + 1
        position = start
        while True:
            position = _PLAIN[quote].match(text, position).end()  # type: ignore[union-attr]
            if position + 1 >= len(text) and text[position:] in ("", "\\"):
                raise _Cut
            if text[position] == "\\":
                position += 2
            elif _AFTER_STRING.match(text, position + 1):
                return _unescaped(text[start:position]), position + 1
            elif _JOINED.match(text, position + 1):
                raise _Broken(position + 1)
            else:
                position += 1

    def _recovered(self, stack: list[_Frame], position: int) -> int:
        """Gives up one item of a list of objects; returns where the list goes on.

        Raises:
          _Broken: the error is not inside such a list.
          _Cut: the item does not end.
        """
        pairs = itertools.pairwise(stack)
        depths = [i for i, (a, b) in enumerate(pairs) if a.closer == "]" and b.closer == "}"]
        top = stack[-1]
        if self.is_too_deep:
            raise _Broken(position)
        if top.closer == "]" and (not depths or top.holds_objects()):
            char, position = next(self._structure(position), ("}", position))
            if char == "}":
                raise _Broken(position)
            top.add(BROKEN)
            if char in _CLOSER:
                top.expects = "value"
            return position
        if not depths:
            raise _Broken(position)
        items, item = stack[depths[-1]], stack[depths[-1] + 1]
        is_next = self._text.startswith("{", position) and item is top and top.expects != "value"
        if not is_next:
            closers = [frame.closer for frame in stack[depths[-1] + 1 :]]
            position = self._behind(closers, position)
        del stack[depths[-1] + 1 :]
        items.add(BROKEN)
        if is_next:  # the item was never closed, and the next one begins
            items.expects = "value"
        return position

    def _behind(self, closers: list[str], position: int) -> int:
        """Where the item ends whose brackets are to be closed by ``closers``."""
        for char, index in self._structure(position):
            if char in _CLOSER:
                closers.append(_CLOSER[char])
            elif char in closers:
                while closers.pop() != char:
                    pass
                if not closers:
                    return index + 1
            elif char == "]":  # closes the list around an item that was not closed
                return index
        raise _Cut

    def _structure(self, position: int) -> Iterator[tuple[str, int]]:
        """Brackets and commas outside strings."""
        while match := _STRUCTURE.search(self._text, position):
            if match[0] not in _QUOTES:
                yield match[0], match.start()
                position = match.end()
                continue
            try:
                _, position = self.string(match.start())
            except _Broken as error:
                position = error.position


def _blank(text: str, position: int) -> int:
    """Behind the blanks and comments at ``position``."""
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]


def _unescaped(text: str) -> str:
    """The content of a string; a backslash that escapes nothing stays, as in Python."""
    if "\\" not in text:
        return text
    plain = _ESCAPE.sub(
        lambda m: chr(int(m[1], 16)) if m[1] else _ESCAPES.get(m[2], m[0]),
        text,
    )
    return _SURROGATES.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), plain)


def _decoded(text: str, start: int) -> tuple[str, int]:
    """``text`` from ``start`` to the first bare quote, a level of escapes less; and that place."""
    match = _ENCODED_TEXT.match(text, start)
    assert match is not None  # the pattern matches the empty string
    return _unescaped(match[0]), match.end()
