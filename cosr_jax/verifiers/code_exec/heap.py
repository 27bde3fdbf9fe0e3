"""Mutable containers that both sides hold: each change travels with the next message.

When a list, dict, set, bytearray, deque or NumPy array crosses, both sides remember the two copies
as twins.  Every later message begins with the contents of the twins that have changed since, so
that mutation in place, aliasing, identity and cycles are those of one process.  A twin that one
side alone still refers to is forgotten: what nobody can see need not be kept alike.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import sys
from collections.abc import Iterator
from typing import Any

from cosr_jax.verifiers.code_exec.values import dtype_token, read_array
from cosr_jax.verifiers.code_exec.wire import Reader, WireError, Writer, pack

_KINDS: dict[type, bytes] = {
    list: b"l",
    dict: b"d",
    set: b"s",
    bytearray: b"y",
    collections.deque: b"q",
    collections.defaultdict: b"D",
    collections.OrderedDict: b"o",
    collections.Counter: b"c",
}
_ARRAY = b"n"
_MAKERS = {kind[0]: make for make, kind in _KINDS.items()}
_MAPPINGS = (dict, collections.defaultdict, collections.OrderedDict, collections.Counter)


class _Shared:
    """One of a pair of twins."""

    __slots__ = ("kind", "number", "seen", "value")

    def __init__(self, number: int, kind: bytes, value: Any):
        self.number = number
        self.kind = kind
        self.value = value
        self.seen: Any = None  # contents when both sides were last alike

    def has_changed(self) -> bool:
        value, seen = self.value, self.seen
        if self.kind == b"y":
            return value != seen
        if self.kind == _ARRAY:
            return (value.dtype, value.shape, value.tobytes()) != seen
        now = _items(value)
        # Identity is enough: what is inside is immutable, a twin of its own, or a handle.
        return len(now) != len(seen) or not all(map(operator.is_, now, seen))

    def remember(self) -> None:
        if self.kind == b"y":
            self.seen = bytes(self.value)
        elif self.kind == _ARRAY:
            self.seen = (self.value.dtype, self.value.shape, self.value.tobytes())
        else:
            self.seen = _items(self.value)


def _items(value: Any) -> list[Any]:
    if type(value) in _MAPPINGS:
        factory = [value.default_factory] if type(value) is collections.defaultdict else []
        return [*factory, *value.keys(), *value.values()]
    return list(value)


def _count_references() -> int:
    shared = _Shared(0, b"l", [])
    return sys.getrefcount(shared.value)


_ONLY_HERE = _count_references()


def is_array(value: Any) -> bool:
    """Whether the value is exactly a NumPy array of a type that travels."""
    numpy = sys.modules.get("numpy")
    return (
        numpy is not None and type(value) is numpy.ndarray and dtype_token(value.dtype) is not None
    )


class Heap:
    """The twins that one side knows.

    Args:
      first: 0 on one side and 1 on the other; each numbers its own discoveries by twos.
    """

    def __init__(self, first: int):
        self._next = first
        self._by_number: dict[int, _Shared] = {}
        self._by_id: dict[int, _Shared] = {}
        self._pending: list[_Shared] = []
        self._fresh: list[_Shared] = []

    def __len__(self) -> int:
        return len(self._by_number)

    def number_of(self, value: Any) -> int:
        """The number of the value's twin, which is made if there is none."""
        shared = self._by_id.get(id(value))
        if shared is None:
            kind = _KINDS.get(type(value), _ARRAY)
            shared = self._add(self._next, kind, value)
            self._next += 2
            self._fresh.append(shared)
            self._pending.append(shared)
        return shared.number

    def get(self, number: int) -> Any:
        """The container of that number.

        Raises:
          WireError: there is none.
        """
        try:
            return self._by_number[number].value
        except KeyError:
            raise WireError("an unknown container") from None

    def begin(self) -> list[int]:
        """Before a message is written: forgets what only the heap holds, and says which."""
        self._fresh, self._pending = [], []
        dropped = []
        for shared in list(self._by_number.values()):
            if shared.has_changed():
                self._pending.append(shared)  # the other side may look at it yet
            elif sys.getrefcount(shared.value) <= _ONLY_HERE:
                dropped.append(shared.number)
                self.drop(shared.number)
        return dropped

    def undo(self) -> None:
        """The message that was begun is not sent: its new twins are none."""
        for shared in self._fresh:
            self.drop(shared.number)

    def write_contents(self, writer: Writer) -> None:
        """Writes what has changed, and the contents of new twins, into which more may be drawn."""
        position = len(writer.data)
        writer.number(0)
        count = 0
        while count < len(self._pending):
            shared = self._pending[count]
            count += 1
            shared.remember()
            writer.number(shared.number)
            _write_content(writer, shared)
        writer.data[position : position + 4] = count.to_bytes(4, "little")

    def write_fresh(self, writer: Writer) -> None:
        """Writes the heads of the new twins; the reader needs them first."""
        writer.number(len(self._fresh))
        for shared in self._fresh:
            writer.data += shared.kind
            writer.number(shared.number)
            if shared.kind == b"q":
                writer.value(shared.value.maxlen)
            elif shared.kind == _ARRAY:
                _write_content(writer, shared)

    def read_fresh(self, reader: Reader) -> None:
        """Makes the containers, empty as yet, of the other side's new twins."""
        for _ in range(reader.number()):
            kind = reader.take(1)
            number = reader.number()
            if number in self._by_number or number % 2 == self._next % 2:
                raise WireError("a container with a number that is not free")
            if kind == b"q":
                maxlen = reader.value()
                if maxlen is not None and (type(maxlen) is not int or not 0 <= maxlen < 1 << 62):
                    raise WireError("a deque of no length")
                value: Any = collections.deque(maxlen=maxlen)
            elif kind == _ARRAY:
                value = _read_array(reader)
            elif kind[0] in _MAKERS:
                value = _MAKERS[kind[0]]()
                reader.count()
            else:
                raise WireError("an unknown kind of container")
            self._add(number, kind, value).remember()

    def read_contents(self, reader: Reader) -> Iterator[_Update]:
        """The contents that have changed; they take effect with ``_Update.apply``."""
        for _ in range(reader.number()):
            try:
                shared = self._by_number[reader.number()]
            except KeyError:
                raise WireError("contents of an unknown container") from None
            yield _Update(shared, _read_content(reader, shared))

    def drop(self, number: int) -> None:
        """Forgets a twin, if it is known: both sides may give it up at once."""
        shared = self._by_number.pop(number, None)
        if shared is not None:
            del self._by_id[id(shared.value)]

    def _add(self, number: int, kind: bytes, value: Any) -> _Shared:
        shared = _Shared(number, kind, value)
        self._by_number[number] = shared
        self._by_id[id(value)] = shared
        return shared


@dataclasses.dataclass
class _Update:
    """New contents of a twin."""

    shared: _Shared
    content: Any

    def apply(self) -> None:
        """Puts the contents in place.

        Raises:
          WireError: they do not go into such a container.
        """
        value, content = self.shared.value, self.content
        try:
            if type(value) in _MAPPINGS:
                if type(value) is collections.defaultdict:
                    value.default_factory = content.pop(0)
                value.clear()
                for key, item in zip(content[::2], content[1::2], strict=True):
                    value[key] = item  # not ``update``: that of a Counter adds
            elif type(value) in (list, bytearray):
                value[:] = content
            elif type(value) is set:
                value.clear()
                value.update(content)
            elif type(value) is collections.deque:
                value.clear()
                value.extend(content)
            elif content.shape == value.shape and content.dtype == value.dtype:
                if not value.flags.writeable:
                    raise WireError("a change of a read-only array")
                value[...] = content
            else:
                raise WireError("an array that has changed its shape")
        except (TypeError, ValueError, IndexError) as error:
            raise WireError(f"contents that do not fit: {type(error).__name__}") from error
        self.shared.remember()


def _write_content(writer: Writer, shared: _Shared) -> None:
    value = shared.value
    if shared.kind == b"y":
        writer.chunk(value)
    elif shared.kind == _ARRAY:
        writer.text(b"", dtype_token(value.dtype) or "")
        writer.value(value.shape)
        writer.chunk(value.tobytes())
    elif type(value) in _MAPPINGS:
        factory = [value.default_factory] if type(value) is collections.defaultdict else []
        writer.values(b"[", factory + [part for pair in value.items() for part in pair])
    elif type(value) is list and (packed := pack(value)) is not None:
        writer.data += packed[0].encode()
        writer.chunk(packed[1])
    else:
        writer.values(b"[", value)


def _read_content(reader: Reader, shared: _Shared) -> Any:
    if shared.kind == b"y":
        return reader.chunk()
    if shared.kind == _ARRAY:
        return _read_array(reader)
    tag = reader.take(1)
    if tag in (b"q", b"d") and shared.kind == b"l":
        return reader.packed(tag.decode())
    if tag != b"[":
        raise WireError("contents of an unknown form")
    return reader.values()


def _read_array(reader: Reader) -> Any:
    token = reader.text()
    return read_array(token, reader.exact(tuple), reader.chunk())
