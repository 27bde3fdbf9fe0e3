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
    has_member: bool  # a key with a colon is in it


def values(text: str) -> Iterator[Found]:
    """The outermost objects and lists of ``text``, in order.

    A bracket behind which nothing can be read is taken for prose.  Behind the break of a value that
    was never closed, the next one is looked for where a line opens a fence or a bracket, or where
    reasoning ends: anything else may stand inside a string of the broken one.
    """
    reader = _Reader(text)
    fuel = _EFFORT * len(text)
    position = 0
    while fuel >= 0 and (match := _START.search(text, position)):
        if _ENCODED.match(text, match.start()):
            decoded, position = _decoded(text, match.start())
            for found in values(decoded):
                yield dataclasses.replace(found, start=match.start(), end=position)
            continue
        found = reader.read(match.start())
        fuel -= found.end - found.start
        position = found.end
        if found.is_closed or found.has_member or found.is_clean:
            yield found
        if found.is_closed:
            continue
        if reader.is_hopeless and (reader.error_at == found.end or not found.has_member):
            continue
        if not found.has_member:
            position = found.start + 1
        elif reader.error_at is not None:
            again = _RESTART.search(text, reader.error_at)
            position = again.end() if again else len(text)


#: Characters read, per character of a text, before broken beginnings are given up.
_EFFORT = 4
_MAX_DEPTH = 32

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
#: A quote closes its string where the grammar can go on: before a delimiter, a comment, the end,
#: or the next key of an object whose comma is missing.  Elsewhere it belongs to the string.
_AFTER_STRING = rf"{_SPACE}*+(?:[,:}}\]\#]|/[/*]|\Z|[\"'][A-Za-z_]\w*+[\"']{_SPACE}*+:)"
#: "a" "b" and "a" + "b": an expression, which nobody evaluates here.
_JOINED = rf"{_SPACE}*+\+{_SPACE}*+[\"']|{_SPACE}++[\"']"
#: Opening quote -> everything up to the quote that closes the string or breaks it.
_BODY = {
    quote: re.compile(
        rf"(?:[^\\{closers}]++|\\.|[{closers}](?!{_AFTER_STRING}|{_JOINED}))*+", re.DOTALL
    )
    for quote, closers in _QUOTES.items()
}
_CLOSES = re.compile(_AFTER_STRING)
_TRIPLE = {
    quote: re.compile(rf"(?:[^\\{quote}]++|\\.|{quote}(?!{quote}{quote}))*+", re.DOTALL)
    for quote in "\"'"
}
_ESCAPES = {
    **{"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"},
    **{"/": "/", "\\": "\\", '"': '"', "'": "'", "`": "`"},
}
#: JSON's escapes, and Python's for a character by its number.
_ESCAPE = re.compile(
    r"\\(?:u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|U(000[0-9A-Fa-f]{5}|0010[0-9A-Fa-f]{4})|(.))",
    re.DOTALL,
)
_SURROGATES = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")

#: An object that opens with a key, or ends at once; or a list.
_START = re.compile(
    rf"\[(?!CDATA\[)(?<!\[CDATA\[)|\{{(?={_SPACE}*+(?:[\"'`\u201c\u201e\u2018}}\#/\\]|\Z|[A-Za-z_$][\w$-]*+{_SPACE}*+:))"
)
_RESTART = re.compile(r"^(?:[ \t]*```|(?=[{\[]))|<\|message\|>|</think", re.MULTILINE)
#: Frames of the chat format: outside a string they end whatever is open.
_MARK = re.compile(r"<\||</?think|```")
#: What matters outside strings.  An apostrophe behind a letter opens no string.
_STRUCTURE = re.compile(rf"{_MARK.pattern}|[{{}}\[\],\"\u201c\u201e]|(?<!\w)['`\u2018]")
_GOES_ON = re.compile(rf"{_SPACE}*+,{_SPACE}*+\"")
_CLOSER = {"{": "}", "[": "]"}
#: A value whose own quotes are escaped: encoded as a string once more.
_ENCODED = re.compile(r"[{\[](?:\s|\\[nrt]|[{\[]){0,64}+\\\"")
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
        # Of the last value read:
        self._has_member = False
        self.is_hopeless = False  # it ended at a mark, or too deep: nothing of it follows
        self.error_at: int | None = None  # where the grammar failed first
        self._string: int | None = None  # where the last token begins, if it is a string
        self._string_before: int | None = None  # the same of the token before it

    def read(self, start: int) -> Found:
        """What opens at ``start``."""
        self._has_member = self.is_hopeless = False
        self.error_at = self._string_before = self._string = None
        opener = self._text[start]
        stack = [_Frame(_CLOSER[opener], "key" if opener == "{" else "value")]
        position = start + 1
        while True:
            try:
                position = self._step(stack, position)
            except _Cut:
                position = len(self._text)
                break
            except _Broken as error:
                if self.error_at is None:  # a string just before may be longer than was meant
                    is_behind = self._string_before is not None
                    self.error_at = self._string_before if is_behind else error.position
                try:
                    position = self._recovered(stack, error.position)
                except _Cut:
                    position = len(self._text)
                    break
                except _Broken as end:
                    position = end.position
                    break
            if stack[0].expects == "end":
                return self._found(stack[0].closed(), start, position, True)
        child = stack.pop().cut()
        while stack:
            stack[-1].add(child)
            child = stack.pop().cut()
        return self._found(child, start, position, False)

    def _found(self, value: Any, start: int, end: int, is_closed: bool) -> Found:
        return Found(value, start, end, is_closed, self.error_at is None, self._has_member)

    def _step(self, stack: list[_Frame], position: int) -> int:
        """Reads one token; returns where the next one may begin."""
        self._string_before, self._string = self._string, None
        position = _blank(self._text, position)
        if position == len(self._text):
            raise _Cut
        char, frame = self._text[position], stack[-1]
        if char in "<`" and _MARK.match(self._text, position):
            self.is_hopeless = True
            raise _Broken(position)
        is_object = frame.closer == "}"
        if char == frame.closer and frame.expects not in ("colon", "value" if is_object else ""):
            if len(stack) == 1:
                frame.expects = "end"
            else:
                stack.pop()
                stack[-1].add(frame.closed())
            return position + 1
        if char == "," and (frame.members or not is_object) and frame.expects != "colon":
            if is_object and frame.expects == "value":
                raise _Broken(position)
            frame.expects = "key" if is_object else "value"
            return position + 1
        if frame.expects == "colon":
            if char != ":":
                raise _Broken(position)
            frame.expects, self._has_member = "value", True
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
                self.is_hopeless = True
                raise _Broken(position)
            stack.append(_Frame(_CLOSER[char], "key" if char == "{" else "value"))
            return position + 1
        value, position = self._scalar(position)
        frame.add(value)
        return position

    def _key(self, position: int) -> tuple[str, int]:
        if self._text[position] in _QUOTES:
            key, end = self._string_at(position)
            if "\n" in key:
                raise _Broken(position)
            return key, end
        name = _NAME.match(self._text, position)
        if name is None:
            raise _Broken(position)
        return name[0], name.end()

    def _scalar(self, position: int) -> tuple[Any, int]:
        text = self._text
        if text[position] in _QUOTES:
            return self._string_at(position)
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

    def _string_at(self, position: int) -> tuple[str, int]:
        """The string that opens at ``position``, and where it ends."""
        self._string = position
        text, quote = self._text, self._text[position]
        width = 3 if quote in _TRIPLE and text.startswith(3 * quote, position) else 1
        start = position + width
        body = (_TRIPLE if width == 3 else _BODY)[quote].match(text, start)
        end = start if body is None else body.end()
        if end == len(text) or text[end] == "\\":
            raise _Cut
        if width == 1 and not _CLOSES.match(text, end + 1):
            raise _Broken(end + 1)
        return _unescaped(text[start:end]), end + width

    def _recovered(self, stack: list[_Frame], position: int) -> int:
        """Gives up one item of a list of objects; returns where the list goes on.

        Raises:
          _Broken: the error is not inside such a list.
          _Cut: the item does not end.
        """
        if self.is_hopeless:
            raise _Broken(position)
        top, depth = stack[-1], len(stack) - 2  # the list of the innermost object in a list
        while depth >= 0 and (stack[depth].closer, stack[depth + 1].closer) != ("]", "}"):
            depth -= 1
        if top.closer == "]" and (depth < 0 or top.holds_objects()):
            char, position = next(self._structure(position), ("}", position))
            if char == "}":
                raise _Broken(position)
            top.add(BROKEN)
            if char in _CLOSER:
                top.expects = "value"
            return position
        if depth < 0:
            raise _Broken(position)
        items, item = stack[depth], stack[depth + 1]
        is_next = self._text.startswith("{", position) and item is top and top.expects != "value"
        if not is_next:
            closers = [frame.closer for frame in stack[depth + 1 :]]
            position = self._behind(closers, position)
        del stack[depth + 1 :]
        items.add(BROKEN)
        if is_next:  # the item was never closed, and the next one begins
            items.expects = "value"
        return position

    def _behind(self, closers: list[str], position: int) -> int:
        """Where the item ends whose brackets are to be closed by ``closers``."""
        for char, index in self._structure(position):
            if char in _CLOSER:
                if len(closers) == _MAX_DEPTH:
                    self.is_hopeless = True
                    raise _Broken(index)
                closers.append(_CLOSER[char])
            elif char in closers:
                while closers.pop() != char:
                    pass
                if not closers:
                    return index + 1
            elif char == "]" and not _GOES_ON.match(self._text, index + 1):
                return index  # it closes the list around an item that was not closed
        raise _Cut

    def _structure(self, position: int) -> Iterator[tuple[str, int]]:
        """Brackets and commas outside strings."""
        while match := _STRUCTURE.search(self._text, position):
            position = match.end()
            if match[0] in _QUOTES:
                try:
                    _, position = self._string_at(match.start())
                except _Broken as error:
                    position = error.position
            elif len(match[0]) > 1:
                self.is_hopeless = True
                raise _Broken(match.start())
            else:
                yield match[0], match.start()


def _blank(text: str, position: int) -> int:
    """Behind the blanks and comments at ``position``."""
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]


def _unescaped(text: str) -> str:
    """The content of a string; a backslash that escapes nothing stays, as in Python."""
    if "\\" not in text:
        return text

    def character(escape: re.Match[str]) -> str:
        number = escape[1] or escape[2] or escape[3]
        return chr(int(number, 16)) if number else _ESCAPES.get(escape[4], escape[0])

    plain = _ESCAPE.sub(character, text)
    return _SURROGATES.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), plain)


def _decoded(text: str, start: int) -> tuple[str, int]:
    """``text`` from ``start`` to the first bare quote, a level of escapes less; and that place."""
    match = _ENCODED_TEXT.match(text, start)
    assert match is not None  # the pattern matches the empty string
    return _unescaped(match[0]), match.end()
