"""Values as bytes: tagged, strict, bounded, and never executed.

A value is one tag byte and what belongs to it (``values``); numbers are little-endian.  Containers
that can change travel as the number of their twin (``heap``), objects as handles (``handles``):
both go through the ``Link`` that reader and writer are given.  A reader accepts exactly what a
writer makes of a value; anything else raises ``WireError``.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

from cosr_jax.verifiers.code_exec import known

#: Tuples, frozensets and slices nested deeper than this do not travel.
MAX_DEPTH = 150
#: Values in one message; homogeneous lists of numbers count as one for each 16 items.
MAX_NODES = 3_000_000
#: Bytes in one message.
MAX_BYTES = 48 << 20

_U32 = struct.Struct("<I")


class WireError(Exception):
    """What was received is no message, or what is to be sent cannot be one."""


class TooLargeError(WireError):
    """The value is larger than a message may be."""


class Link(Protocol):
    """What a codec asks of the conversation that it belongs to."""

    def write_twin(self, writer: Writer, value: Any) -> None: ...
    def write_object(self, writer: Writer, value: Any) -> None: ...
    def read_twin(self, number: int) -> Any: ...
    def read_object(self, tag: int, reader: Reader) -> Any: ...

    @property
    def is_strict(self) -> bool:
        """Whether this side refuses builtins that act on its process."""
        ...

    @property
    def peer_is_strict(self) -> bool:
        """Whether the other side does."""
        ...


class Writer:
    """Appends values to ``data``."""

    def __init__(self, link: Link):
        self.data = bytearray()
        self.link = link
        self._depth = 0

    def value(self, value: Any) -> None:
        """Appends a value.

        Raises:
          WireError: it cannot travel.
          TooLargeError: the message has become too large.
        """
        write = WRITERS.get(type(value))
        if write is not None:
            write(self, value)
        elif (name := known.name_of(value, self.link.peer_is_strict)) is not None:
            self.text(b"B", name)
        else:
            self.link.write_object(self, value)
        if len(self.data) > MAX_BYTES:
            raise TooLargeError(f"more than {MAX_BYTES >> 20} MiB")

    def number(self, number: int) -> None:
        """Appends an unsigned 32-bit number."""
        self.data += _U32.pack(number)

    def chunk(self, data: bytes | bytearray) -> None:
        """Appends bytes with their length."""
        if len(data) > MAX_BYTES:
            raise TooLargeError(f"more than {MAX_BYTES >> 20} MiB")
        self.data += _U32.pack(len(data))
        self.data += data

    def text(self, tag: bytes, text: str) -> None:
        """Appends a tag and a text."""
        self.data += tag
        self.chunk(text.encode("utf-8", "surrogatepass"))

    def values(self, tag: bytes, values: Any) -> None:
        """Appends a tag, how many values there are, and the values."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise WireError(f"nested deeper than {MAX_DEPTH} levels")
        self.data += tag
        self.data += _U32.pack(len(values))
        for value in values:
            self.value(value)
        self._depth -= 1


class Reader:
    """Reads what a ``Writer`` made."""

    def __init__(self, data: bytes, link: Link):
        self._data = data
        self._at = 0
        self._depth = 0
        self._nodes = 0
        self.link = link

    def value(self) -> Any:
        """The next value.

        Raises:
          WireError: there is none.
        """
        self.count()
        tag = self.take(1)[0]
        read = READERS.get(tag)
        if read is not None:
            return read(self)
        return self.link.read_object(tag, self)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise WireError("a message that ends early")
        data = self._data[self._at : end]
        self._at = end
        return data

    def number(self) -> int:
        """The next unsigned 32-bit number."""
        return _U32.unpack(self.take(4))[0]

    def chunk(self) -> bytes:
        """Bytes behind their length."""
        return self.take(self.number())

    def text(self) -> str:
        """A text behind its length."""
        try:
            return self.chunk().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise WireError("a text that is none") from error

    def values(self) -> list[Any]:
        """Values behind their number."""
        count = self.number()
        if count > len(self._data) - self._at:
            raise WireError("a message that ends early")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise WireError(f"nested deeper than {MAX_DEPTH} levels")
        values = [self.value() for _ in range(count)]
        self._depth -= 1
        return values

    def exact(self, kind: type) -> Any:
        """The next value, which must be of exactly that type."""
        value = self.value()
        if type(value) is not kind:
            raise WireError(f"{kind.__name__} expected")
        return value

    def end(self) -> None:
        """Makes sure that nothing is left."""
        if self._at != len(self._data):
            raise WireError("a message with something behind its end")

    def packed(self, code: str) -> list[Any]:
        """Numbers of one machine type."""
        data = self.chunk()
        if len(data) % 8:
            raise WireError("a row of numbers with a broken end")
        self.count(len(data) // 128)
        numbers = array.array(code)
        numbers.frombytes(data)
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tolist()

    def count(self, nodes: int = 1) -> None:
        """Accounts for values.

        Raises:
          TooLargeError: the message holds too many.
        """
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise TooLargeError(f"more than {MAX_NODES} values")


#: By exact type, and by tag; ``values`` fills them.
WRITERS: dict[type, Callable[[Writer, Any], None]] = {}
READERS: dict[int, Callable[[Reader], Any]] = {}


def pack(values: list[Any]) -> tuple[str, bytes] | None:
    """A list of int or of float alone, as one block; None for any other, or for huge integers."""
    kinds = set(map(type, values))
    if len(values) < 8 or len(kinds) != 1:
        return None
    code = {int: "q", float: "d"}.get(kinds.pop())
    if code is None:
        return None
    try:
        block = array.array(code, values)
    except OverflowError:
        return None
    if sys.byteorder == "big":
        block.byteswap()
    return code, block.tobytes()
