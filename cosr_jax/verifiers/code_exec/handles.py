"""Objects without a plain form stay where they are and travel as numbers, classes as descriptions.

Exceptions travel by class, arguments and text.  What the other side says about its objects is
checked like everything else that it sends.
"""

from __future__ import annotations

import sys
import types
import weakref
from typing import TYPE_CHECKING, Any, cast

from cosr_jax.verifiers.code_exec import known, methods, proxies, specials
from cosr_jax.verifiers.code_exec.heap import Heap, is_array
from cosr_jax.verifiers.code_exec.ties import How, MirrorType, Tie, set_on_exception, tie_of
from cosr_jax.verifiers.code_exec.values import write_from_library
from cosr_jax.verifiers.code_exec.wire import Reader, WireError, Writer

if TYPE_CHECKING:
    from cosr_jax.verifiers.code_exec.peer import Peer

#: Characters of an exception's text that travel.
_MAX_TEXT = 500

#: Attribute of an exception from the other side: its text there, for people.
TEXT = "_cosr_text"


class Handles:
    """The objects that two sides know of each other; what ``wire`` calls a link.

    Args:
      first: 0 on the tests' side, 1 on the student's.
      is_strict: believe and reveal as little as possible: the tests' side.
    """

    def __init__(self, first: int, is_strict: bool):
        self.is_strict = is_strict
        self.peer_is_strict = not is_strict
        self._heap = Heap(first)
        self._own: dict[int, Any] = {}
        self._own_ids: dict[int, int] = {}
        self._next_own = 0
        self._described: set[int] = set()
        self._newly_described: list[int] = []
        self._theirs: dict[int, weakref.ref[Any]] = {}
        self._their_values: dict[int, Any] = {}  # those that cannot be referred to weakly
        self._released: list[int] = []

    def release(self, number: int) -> None:
        """Nothing here refers to that object of the other side any more."""
        self._released.append(number)

    def _as_peer(self) -> Peer:
        return cast("Peer", self)

    def register(self, value: Any) -> int:
        """The number under which the other side knows an object of ours."""
        number = self._own_ids.get(id(value))
        if number is None:
            number = self._next_own
            self._next_own += 1
            self._own[number] = value
            self._own_ids[id(value)] = number
        return number

    def own(self, number: Any) -> Any:
        """The object of ours that the other side means.

        Raises:
          WireError: there is none.
        """
        if type(number) is not int or number not in self._own:
            raise WireError("an unknown object")
        return self._own[number]

    def _forget(self, number: int) -> None:
        if number == 0 or number in self._described:
            return  # the module, and classes that the other side has mirrored
        value = self._own.pop(number, None)
        self._own_ids.pop(id(value), None)

    def _find(self, number: int) -> Any:
        """The proxy for an object of the other side, None if there is none (any more)."""
        reference = self._theirs.get(number)
        return reference() if reference is not None else self._their_values.get(number)

    def write_twin(self, writer: Writer, value: Any) -> None:
        """A container that can change."""
        writer.data += b"M"
        writer.number(self._heap.number_of(value))

    def read_twin(self, number: int) -> Any:
        """The inverse of ``write_twin``."""
        return self._heap.get(number)

    def write_object(self, writer: Writer, value: Any) -> None:
        """Anything without a plain form."""
        if is_array(value):
            return self.write_twin(writer, value)
        if write_from_library(writer, value):
            return None
        tie = tie_of(value)
        kind = type(value)
        if tie is not None and cast(Any, tie.peer) is self:
            writer.data += b"Y"
            writer.number(tie.number)
        elif issubclass(kind, BaseException):
            self._write_exception(writer, value)
        elif issubclass(kind, type):
            self._write_class(writer, value)
        elif kind is types.FunctionType:
            writer.data += b"L"
            writer.number(self.register(value))
        else:
            writer.data += b"O"
            self._write_class(writer, kind)
            writer.number(self.register(value))
            base = base_of(kind)
            if base in specials.VALUE_BASES:
                writer.value(plain_copy(base, value))

    def _write_class(self, writer: Writer, kind: type) -> None:
        writer.data += b"K"
        number = self.register(kind)
        writer.number(number)
        if number in self._described:
            writer.data += b"."
            return
        self._described.add(number)
        self._newly_described.append(number)
        base = base_of(kind)
        bases = [b for b in kind.__bases__ if issubclass(b, BaseException) or _is_of_program(b)]
        own = set[str]()
        for owner in kind.__mro__:
            if owner is base or owner is object:
                break
            own |= set(owner.__dict__)
        special = specials.owners(kind)
        doc = kind.__doc__
        fields = (
            kind.__name__,
            doc if type(doc) is str else None,
            base.__name__ if base is not None else "",
            tuple(n for n in own if not n.startswith("__")) if base is not None else (),
            tuple(name for name, is_callable in special.items() if is_callable),
            tuple(name for name, is_callable in special.items() if not is_callable),
            kind.__name__ if base is None else base.__name__,
            tuple(getattr(kind, "__dataclass_fields__", ())),
        )
        writer.values(b":", fields)
        writer.number(len(bases))
        for each in bases:
            writer.value(each) if issubclass(each, BaseException) else self._write_class(
                writer, each
            )

    def _write_exception(self, writer: Writer, error: BaseException) -> None:
        kind = type(error)
        is_own = known.name_of(kind, self.peer_is_strict) is None
        args = error.args if type(error.args) is tuple else ()
        if isinstance(error, BaseExceptionGroup):  # whose members must be there at once
            args = (error.message, error.exceptions)
        cause = error.__cause__
        writer.values(
            b"X",
            (
                kind,
                args,
                _text_of(error),
                cause if isinstance(cause, (BaseException, types.NoneType)) else None,
            ),
        )
        writer.number(self.register(error) + 1 if is_own else 0)

    def read_object(self, tag: int, reader: Reader) -> Any:
        """The inverse of ``write_object``."""
        if tag == ord(b"Y"):
            return self.own(reader.number())
        if tag == ord(b"L"):
            number = reader.number()
            return self._proxy(number, proxies.FUNCTION, None, None)
        if tag == ord(b"K"):
            return self._read_class(reader)
        if tag == ord(b"O"):
            if reader.take(1) != b"K":
                raise WireError("an object of no class")
            kind = self._read_class(reader)
            class_tie = tie_of(kind)
            if class_tie is None or issubclass(kind, BaseException):
                raise WireError("an object of no class")
            number = reader.number()
            value = None
            if class_tie.base in specials.VALUE_BASES:
                value = reader.exact(class_tie.base)
            if class_tie.is_coroutine:
                return methods.as_coroutine(self._as_peer(), number)
            return self._proxy(number, kind, class_tie.base, value)
        if tag == ord(b"X"):
            return self._read_exception(reader)
        raise WireError("an unknown tag")

    def _proxy(self, number: int, kind: type, base: type | None, value: Any) -> Any:
        found = self._find(number)
        if found is None or (type(found) is not kind and tie_of(found) is not None):
            # Unknown, or of another class than it was, which Python allows.
            tie = Tie(self._as_peer(), number, base)
            found = proxies.make_instance(kind, tie, value)
            if base in specials.VALUE_BASES:
                self._their_values[number] = found
            else:
                self._theirs[number] = weakref.ref(found)
        elif type(found) is not kind:
            raise WireError("an object that has become another")
        else:
            # Whatever it was: a function may have returned it to answer in place of plain data.
            known_tie = tie_of(found)
            if known_tie is not None and known_tie.how is How.MADE:
                known_tie.how = How.RETURNED
        return found

    def _read_class(self, reader: Reader) -> Any:
        number = reader.number()
        mark = reader.take(1)
        if mark == b".":
            kind = self._their_values.get(number)
            if type(kind) is not MirrorType:
                raise WireError("an unknown class")
            return kind
        fields = reader.values()
        if mark != b":" or len(fields) != 8 or number in self._their_values:
            raise WireError("a class that is none")
        name, doc, base_name, own, callables, blocked, hint, data_fields = fields
        texts = (name, base_name, hint)
        names = (own, callables, blocked, data_fields)
        if (
            any(type(text) is not str for text in texts)
            or type(doc) not in (str, types.NoneType)
            or any(type(each) is not tuple for each in names)
            or any(type(text) is not str for each in names for text in each)
        ):
            raise WireError("a class that is none")
        bases = []
        for _ in range(reader.number()):
            base = reader.value()
            if not isinstance(base, type):
                raise WireError("a class that is none")
            bases.append(base)
        tie = Tie(self._as_peer(), number, _BASES.get(base_name))
        special = dict.fromkeys(callables, True) | dict.fromkeys(blocked, False)
        safe_name = name.replace("\0", "")[:200].encode(errors="replace").decode()
        kind = proxies.make_class(tie, safe_name, doc, bases, own, special, hint, data_fields)
        self._their_values[number] = kind
        return kind

    def _read_exception(self, reader: Reader) -> Any:
        fields = reader.values()
        number = reader.number()
        if len(fields) != 4:
            raise WireError("an exception that is none")
        kind, args, text, cause = fields
        if (  # what the other side says about itself is checked like everything else
            not isinstance(kind, type)
            or not issubclass(kind, BaseException)
            or type(args) is not tuple
            or type(text) is not str
            or not isinstance(cause, (BaseException, types.NoneType))
        ):
            raise WireError("an exception that is none")
        if number:
            found = self._find(number - 1)
            if found is not None:
                return found
        is_mirrored = type(kind) is MirrorType
        if bool(number) is not is_mirrored:
            raise WireError("an exception that is none")
        tie = Tie(self._as_peer(), number - 1) if number else None
        error = proxies.make_exception(kind, tie, args)
        if tie is not None:
            self._theirs[number - 1] = weakref.ref(error)
        if cause is not None:
            error.__cause__ = cause
        set_on_exception(error, TEXT, text)
        return error


_BASES = {base.__name__: base for base in (*specials.VALUE_BASES, *specials.CONTENT_BASES)}


def base_of(kind: type) -> type | None:
    """The builtin that a class is derived from."""
    for owner in kind.__mro__:
        if owner in _BASES.values():
            return owner
    return None


def _is_of_program(kind: type) -> bool:
    """Whether a class comes from the program or the tests, rather than from a library."""
    return str(kind.__module__).partition(".")[0] not in sys.stdlib_module_names


def plain_copy(base: type, value: Any) -> Any:
    """A copy, of exactly the builtin type, of what an object of a derived class carries."""
    if base is dict:
        return dict(dict.items(value))
    if base in (list, set, tuple, frozenset):
        return base(base.__iter__(value))
    if base in (bytes, bytearray):
        return base(memoryview(value))
    convert = {str: str.__str__, int: int.__int__, float: float.__float__}
    return convert.get(base, complex.__complex__)(value)


def _text_of(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as own:
        return f"<{type(own).__name__} in its text>"
    return text[:_MAX_TEXT] if type(text) is str else ""
