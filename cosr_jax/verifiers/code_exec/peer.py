"""One end of the conversation between T and S: asks, answers, keeps handles and twins alike.

A message is a request or an answer; while one side waits for its answer it serves the requests of
the other, so that callbacks nest as calls do.  Objects without a plain form stay where they are
and travel as numbers.
"""

from __future__ import annotations

import inspect
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

from cosr_jax.verifiers.code_exec import known, proxies, specials
from cosr_jax.verifiers.code_exec.channel import Channel, Closed
from cosr_jax.verifiers.code_exec.heap import Heap, is_array
from cosr_jax.verifiers.code_exec.wire import Reader, TooLargeError, WireError, Writer

#: Requests under way in each other.
_MAX_NESTED = 80
#: Characters of an exception's text that travel.
_MAX_TEXT = 500

#: Attribute of an exception from the other side: its text there, for people.
TEXT = "_cosr_text"


class Lost(BaseException):
    """The other side is no use any more; nobody has a reason to catch it."""


_REQUEST, _VALUE, _EXCEPTION = b"?", b"=", b"!"
_FUNCTIONS = (types.FunctionType,)


class Peer:
    """What both sides have in common.

    Args:
      channel: to the other side.
      first: 0 on the tests' side, 1 on the student's.
      is_strict: believe and reveal as little as possible: the tests' side.
    """

    def __init__(self, channel: Channel, first: int, is_strict: bool):
        self.is_strict = is_strict
        self.peer_is_strict = not is_strict
        self._channel = channel
        self._heap = Heap(first)
        self._own: dict[int, Any] = {}
        self._own_ids: dict[int, int] = {}
        self._next_own = 0
        self._described: set[int] = set()
        self._newly_described: list[int] = []
        self._theirs: dict[int, weakref.ref[Any]] = {}
        self._their_values: dict[int, Any] = {}  # those that cannot be referred to weakly
        self._released: list[int] = []
        self._nested = 0
        self._loop: Any = None

    # What a side adds.

    #: What the other side may ask for, each a method ``do_...``.
    operations: frozenset[str] = frozenset()

    def serve(self, operation: str, arguments: list[Any]) -> Any:
        """Does what the other side asks for; may raise anything.

        Raises:
          WireError: there is no such operation.
        """
        if operation not in self.operations:
            raise WireError("an unknown request")
        return getattr(self, f"do_{operation}")(*arguments)

    def take_output(self) -> str:
        """What was printed since the last message, for the other side to print."""
        return ""

    def give_output(self, text: str) -> None:
        """Prints what the other side has printed."""

    def raised(self, error: BaseException) -> None:
        """The other side has raised this here."""

    def before_sending(self) -> None:
        """A message is about to be written."""

    def after_receiving(self) -> None:
        """A message has been read."""

    def may_swallow(self, error: Any, trace: Any) -> bool:
        """Whether a context manager of the other side may end this exception of ours."""
        return True

    # Conversation.

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Lets the other side do something.

        Raises:
          BaseException: what the other side raised.
          Closed: it is gone.
          WireError: it sent something else than an answer.
        """
        if self._nested >= _MAX_NESTED:
            raise RecursionError("calls between tests and program are nested too deep")
        self._nested += 1
        try:
            self._send(_REQUEST, (operation, *arguments))
            while True:
                kind, value = self._receive()
                if kind == _VALUE:
                    return value
                if kind == _EXCEPTION:
                    if not isinstance(value, BaseException):
                        raise WireError("an exception that is none")
                    self.raised(value)
                    raise value
                self._answer(value)
        finally:
            self._nested -= 1

    def release(self, number: int) -> None:
        """Nothing here refers to that object of the other side any more."""
        self._released.append(number)

    def next_request(self) -> None:
        """Serves one request.

        Raises:
          Closed: the other side is gone.
          WireError: it sent something else than a request.
        """
        kind, value = self._receive()
        if kind != _REQUEST:
            raise WireError("an answer to no question")
        self._answer(value)

    def _answer(self, request: Any) -> None:
        if type(request) is not tuple or not request or type(request[0]) is not str:
            raise WireError("a request that is none")
        operation, *arguments = request
        del request
        try:
            result = self.serve(operation, arguments)
        except (Closed, Lost, WireError):
            raise
        except BaseException as error:
            # Without the frames: they would keep alive what the call alone referred to.
            arguments.clear()
            self._send_exception(error)
            return
        arguments.clear()
        try:
            self._send(_VALUE, result)
        except TooLargeError:
            self.refuse_large()
        except WireError as error:
            self._send_exception(ValueError(f"a value that cannot be returned: {error}"))

    def refuse_large(self) -> None:
        """A result is too large to be sent."""
        self._send_exception(ValueError("a value that is too large to be returned"))

    def _send_exception(self, error: BaseException) -> None:
        try:
            self._send(_EXCEPTION, error)
        except WireError:
            plain = RuntimeError(f"{type(error).__name__} with arguments that cannot be told")
            self._send(_EXCEPTION, plain)

    def _send(self, kind: bytes, value: Any) -> None:
        self.before_sending()
        dropped = self._heap.begin()
        self._newly_described = []
        root, head = Writer(self), Writer(self)
        try:
            root.value(value)
            self._heap.write_contents(root)
        except BaseException as error:
            self._heap.undo()
            self._described.difference_update(self._newly_described)
            if isinstance(error, RecursionError):
                raise WireError("nested too deep") from error
            raise
        released = [n for n in self._released if self._find(n) is None]
        self._released = []
        head.data += kind
        for numbers in (dropped, released):
            head.number(len(numbers))
            for number in numbers:
                head.number(number)
        head.text(b"", self.take_output())
        self._heap.write_fresh(head)
        self._channel.send(head.data + root.data)

    def _receive(self) -> tuple[bytes, Any]:
        data = self._channel.receive()
        try:
            return self._read(Reader(data, self))
        except MemoryError as error:
            raise TooLargeError("a message that does not fit into memory") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise WireError(f"a message that fits nothing: {type(error).__name__}") from error

    def _read(self, reader: Reader) -> tuple[bytes, Any]:
        kind = reader.take(1)
        if kind not in (_REQUEST, _VALUE, _EXCEPTION):
            raise WireError("an unknown kind of message")
        for forget in (self._heap.drop, self._forget):
            for _ in range(reader.number()):
                forget(reader.number())
        output = reader.text()
        self._heap.read_fresh(reader)
        value = reader.value()
        updates = list(self._heap.read_contents(reader))
        reader.end()
        for update in updates:
            update.apply()
        if output:
            self.give_output(output)
        self.after_receiving()
        return kind, value

    # What an owner does with its objects when asked.

    def do_call(self, number: Any, args: Any, kwargs: Any) -> Any:
        """Calls an object."""
        if type(args) is not tuple or type(kwargs) is not dict:
            raise WireError("a call that is none")
        return self.own(number)(*args, **kwargs)

    def do_get(self, number: Any, name: Any) -> Any:
        """An attribute."""
        return getattr(self.own(number), _name(name))

    def do_set(self, number: Any, name: Any, value: Any) -> None:
        """Sets an attribute."""
        setattr(self.own(number), _name(name), value)

    def do_delete(self, number: Any, name: Any) -> None:
        """Deletes an attribute."""
        delattr(self.own(number), _name(name))

    def do_dir(self, number: Any) -> list[str]:
        """Names of attributes."""
        return [str(name) for name in dir(self.own(number))]

    def do_special(self, number: Any, name: Any, args: Any) -> Any:
        """A special method."""
        function = specials.ALL.get(_name(name))
        if function is None or type(args) is not tuple:
            raise WireError("an unknown special method")
        return function(self.own(number), *args)

    def do_await(self, number: Any, name: Any, args: Any) -> Any:
        """Runs a coroutine to its end on this side's event loop."""
        if name not in specials.ASYNC:
            raise WireError("no coroutine")
        if self._loop is None:
            import asyncio  # slows each fork of a server that has it, and few need it

            self._loop = asyncio.new_event_loop()
        value = self.own(number)

        async def run() -> Any:
            return await specials.ALL[name](value, *args)

        return self._loop.run_until_complete(run())

    def do_signature(self, number: Any) -> tuple[tuple[str, int, bool, Any], ...]:
        """Parameters of a callable: name, kind, whether it has a default, and that."""
        empty = inspect.Parameter.empty
        return tuple(
            (p.name, int(p.kind), p.default is not empty, None if p.default is empty else p.default)
            for p in inspect.signature(self.own(number)).parameters.values()
        )

    def do_isinstance(self, number: Any, value: Any) -> bool:
        """Whether the value is of a class of ours."""
        return isinstance(value, self.own(number))

    def do_issubclass(self, number: Any, kind: Any) -> bool:
        """Whether the class is derived from one of ours."""
        return issubclass(kind, self.own(number))

    def do_plain(self, number: Any) -> Any:
        """The contents of an object of a class derived from a container."""
        value = self.own(number)
        base = _base_of(type(value))
        if base is None:
            raise TypeError("no container")
        return _plain(base, value)

    def do_probe(self, number: Any, other: Any, text: Any) -> tuple[bool, bool]:
        """Whether an object equals a text, and whether an empty object of the other's class."""
        value = self.own(number)
        return _equals(value, text), any(_equals(value, each) for each in _blank(type(other)))

    def do_subclass(self, name: Any, bases: Any, space: Any) -> type:
        """A class derived from ours, with methods of the other side."""

        def bind(method: Any) -> Any:
            tie = proxies.tie_of(method)
            if tie is None or type(method) is not proxies.FUNCTION:
                return method
            return lambda *args, **kwargs: method(*args, **kwargs)

        members = {_name(key): bind(value) for key, value in space.items()}
        return types.new_class(_name(name), bases, {}, lambda space: space.update(members))

    # Handles.

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
        tie = proxies.tie_of(value)
        kind = type(value)
        if tie is not None and tie.peer is self:
            writer.data += b"Y"
            writer.number(tie.number)
        elif issubclass(kind, BaseException):
            self._write_exception(writer, value)
        elif issubclass(kind, type):
            self._write_class(writer, value)
        elif kind in _FUNCTIONS:
            writer.data += b"L"
            writer.number(self.register(value))
        else:
            writer.data += b"O"
            self._write_class(writer, kind)
            writer.number(self.register(value))
            base = _base_of(kind)
            if base in specials.VALUE_BASES:
                writer.value(_plain(base, value))

    def _write_class(self, writer: Writer, kind: type) -> None:
        writer.data += b"K"
        number = self.register(kind)
        writer.number(number)
        if number in self._described:
            writer.data += b"."
            return
        self._described.add(number)
        self._newly_described.append(number)
        base = _base_of(kind)
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
            kind = self._read_class(reader) if reader.take(1) == b"K" else None
            class_tie = proxies.tie_of(kind)
            if class_tie is None or issubclass(kind, BaseException):
                raise WireError("an object of no class")
            number = reader.number()
            value = None
            if class_tie.base in specials.VALUE_BASES:
                value = reader.exact(class_tie.base)
            if class_tie.is_coroutine:
                return proxies.as_coroutine(self, number)
            return self._proxy(number, kind, class_tie.base, value)
        if tag == ord(b"X"):
            return self._read_exception(reader)
        raise WireError("an unknown tag")

    def _proxy(self, number: int, kind: type, base: type | None, value: Any) -> Any:
        found = self._find(number)
        if found is None:
            tie = proxies.Tie(self, number, base)
            found = proxies.make_instance(kind, tie, value)
            if base in specials.VALUE_BASES:
                self._their_values[number] = found
            else:
                self._theirs[number] = weakref.ref(found)
        elif type(found) is not kind:
            raise WireError("an object that has become another")
        else:
            # Whatever it was: a function may have returned it to answer in place of plain data.
            tie = proxies.tie_of(found)
            if tie is not None and tie.how is proxies.How.MADE:
                tie.how = proxies.How.RETURNED
        return found

    def _read_class(self, reader: Reader) -> Any:
        number = reader.number()
        mark = reader.take(1)
        if mark == b".":
            kind = self._their_values.get(number)
            if type(kind) is not proxies.MirrorType:
                raise WireError("an unknown class")
            return kind
        fields = reader.values()
        if mark != b":" or len(fields) != 7 or number in self._their_values:
            raise WireError("a class that is none")
        name, doc, base_name, own, callables, blocked, hint = fields
        texts = (name, base_name, hint)
        names = (own, callables, blocked)
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
        tie = proxies.Tie(self, number, _BASES.get(base_name))
        special = dict.fromkeys(callables, True) | dict.fromkeys(blocked, False)
        safe_name = name.replace("\0", "")[:200].encode(errors="replace").decode()
        kind = proxies.make_class(tie, safe_name, doc, bases, own, special, hint)
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
        is_mirrored = type(kind) is proxies.MirrorType
        if bool(number) is not is_mirrored:
            raise WireError("an exception that is none")
        tie = proxies.Tie(self, number - 1) if number else None
        error = proxies.make_exception(kind, tie, args)
        if tie is not None:
            self._theirs[number - 1] = weakref.ref(error)
        if cause is not None:
            error.__cause__ = cause
        proxies.set_on_exception(error, TEXT, text)
        return error


_BASES = {base.__name__: base for base in (*specials.VALUE_BASES, *specials.CONTENT_BASES)}


def _base_of(kind: type) -> type | None:
    """The builtin that a class is derived from."""
    for owner in kind.__mro__:
        if owner in _BASES.values():
            return owner
    return None


def _is_of_program(kind: type) -> bool:
    """Whether a class comes from the program or the tests, rather than from a library."""
    return str(kind.__module__).partition(".")[0] not in sys.stdlib_module_names


def _plain(base: type, value: Any) -> Any:
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


def _name(name: Any) -> str:
    if type(name) is not str:
        raise WireError("a name that is none")
    return name


def _equals(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except Exception:  # what it does not know, it does not equal
        return False


def _blank(kind: type) -> Iterable[Any]:
    try:
        return [kind.__new__(kind)]
    except Exception:  # such objects cannot be empty
        return []
