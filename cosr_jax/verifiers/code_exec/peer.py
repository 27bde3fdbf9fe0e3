"""One end of the conversation between T and S: asks, answers, and does what it is asked for.

A message is a request or an answer; while one side waits for its answer it serves the requests of
the other, so that callbacks nest as calls do.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Any

from cosr_jax.verifiers.code_exec import proxies, specials
from cosr_jax.verifiers.code_exec.channel import Channel, Closed
from cosr_jax.verifiers.code_exec.handles import Handles, base_of, plain_copy
from cosr_jax.verifiers.code_exec.wire import Reader, TooLargeError, WireError, Writer

#: Requests under way in each other.
_MAX_NESTED = 80

_REQUEST, _VALUE, _EXCEPTION = b"?", b"=", b"!"


class Lost(BaseException):
    """The other side is no use any more; nobody has a reason to catch it."""


class Peer(Handles):
    """What both sides have in common.

    Args:
      channel: to the other side.
      first: 0 on the tests' side, 1 on the student's.
      is_strict: believe and reveal as little as possible: the tests' side.
    """

    def __init__(self, channel: Channel, first: int, is_strict: bool):
        super().__init__(first, is_strict)
        self._channel = channel
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
        import asyncio  # both slow each fork of a server that has them, and few need them
        import concurrent.futures

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        value = self.own(number)

        async def run() -> Any:
            return await specials.ALL[name](value, *args)

        if asyncio._get_running_loop() is None:
            return self._loop.run_until_complete(run())
        # This side is amid a coroutine of its own, which waits for the other side's.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, run()).result()

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
        base = base_of(type(value))
        if base is None:
            raise TypeError("no container")
        return plain_copy(base, value)

    def do_probe(self, number: Any, other: Any, text: Any) -> tuple[bool, bool]:
        """Whether an object equals a text, and whether an empty object of the other's class."""
        value = self.own(number)
        return _equals(value, text), any(_equals(value, each) for each in _blank(type(other)))

    def do_code(self, number: Any) -> tuple[int, int, int, tuple[str, ...], str]:
        """What a function's code says about its parameters."""
        function = self.own(number)
        if type(function) is not types.FunctionType:
            raise AttributeError("__code__")
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        counts = (code.co_flags, code.co_argcount, code.co_kwonlyargcount)
        return (*counts, names, code.co_name)

    def do_functions(self, number: Any) -> tuple[str, ...]:
        """Names of the functions that a class itself defines."""
        return tuple(
            name
            for name, value in vars(self.own(number)).items()
            if type(value) is types.FunctionType and (name == "__init__" or name[:2] != "__")
        )

    def do_call_function(self, number: Any, name: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of a class, passing over what derived classes put in its place."""
        return vars(self.own(number))[_name(name)](*args, **kwargs)

    def do_subclass(self, name: Any, bases: Any, space: Any) -> type:
        """A class derived from ours, with methods of the other side."""

        members = {
            _name(key): _as_method(value) if type(value) is proxies.FUNCTION else value
            for key, value in space.items()
        }
        return types.new_class(_name(name), bases, {}, lambda own: own.update(members))


def _name(name: Any) -> str:
    if type(name) is not str:
        raise WireError("a name that is none")
    return name


def _as_method(proxy: Any) -> Any:
    """A function, which unlike a proxy becomes a method of its class."""
    return lambda *args, **kwargs: proxy(*args, **kwargs)


def _equals(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except Exception:  # what it does not know, it does not equal
        return False


def _blank(kind: Any) -> Iterable[Any]:
    try:
        return [kind.__new__(kind)]
    except Exception:  # such objects cannot be empty
        return []
