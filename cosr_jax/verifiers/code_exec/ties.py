"""What binds the proxies of one process to the objects of the other, and their attributes."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosr_jax.verifiers.code_exec.peer import Peer

TIE = "_cosr_tie"
CLASS_TIE = "_cosr_class_tie"

#: Dunder names that are asked for; all others belong to this process.  Never one by which a library
#: hands an operation over to its operands, like ``__array_ufunc__``.
_ASKED_LIST = """
    __all__ __annotations__ __args__ __author__ __call__ __cause__ __contains__ __defaults__
    __dict__ __doc__ __enter__ __exit__ __getitem__ __init__ __iter__ __kwdefaults__ __len__
    __match_args__ __members__ __module__ __name__ __next__ __origin__ __post_init__ __qualname__
    __setitem__ __slots__ __version__
"""
_ASKED = frozenset(_ASKED_LIST.split())


class How(enum.Enum):
    """Where an object of the other side came from, which decides what it may say."""

    MADE = "by calling a class"
    RETURNED = "by any other use"
    DERIVED = "by arithmetic with plain data"


class Tie:
    """What binds a proxy to its object."""

    __slots__ = ("base", "how", "is_coroutine", "number", "peer")

    def __init__(self, peer: Peer, number: int, base: type | None = None):
        self.peer = peer
        self.number = number
        self.base = base  # the builtin whose value or contents the object carries
        self.how = How.RETURNED
        self.is_coroutine = False  # of a class: its instances are run, not looked at


def tie_of(value: Any) -> Tie | None:
    """The tie of a proxy or of a mirrored class; None for everything else."""
    kind = type(value)
    if kind is MirrorType:
        return type.__getattribute__(value, "__dict__")[CLASS_TIE]
    if type(kind) is MirrorType:
        return object.__getattribute__(value, TIE)
    return None


def the_tie(proxy: Any) -> Tie:
    """The tie of what is known to be a proxy or a mirrored class."""
    tie = tie_of(proxy)
    if tie is None:
        raise AttributeError("a proxy without its object")
    return tie


class MirrorType(type):
    """Class of the classes that mirror the other side's."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **kwargs: Any):
        if CLASS_TIE in space:
            return super().__new__(cls, name, bases, space)
        return _subclass(name, bases, space)

    def __init__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **kwargs: Any):
        super().__init__(name, bases, space)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        tie = the_tie(cls)
        made = tie.peer.ask("call", tie.number, args, kwargs)
        set_how(made, How.MADE if tie.how is How.MADE else How.RETURNED)
        return made

    def __getattr__(cls, name: str) -> Any:
        tie = the_tie(cls)
        return ask_attribute(tie, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if is_own(name):
            super().__setattr__(name, value)
        else:
            tie = the_tie(cls)
            tie.peer.ask("set", tie.number, name, value)

    def __delattr__(cls, name: str) -> None:
        tie = the_tie(cls)
        tie.peer.ask("delete", tie.number, name)

    def __dir__(cls) -> list[str]:
        tie = the_tie(cls)
        return tie.peer.ask("dir", tie.number)

    def __instancecheck__(cls, value: Any) -> bool:
        if super().__instancecheck__(value):
            return True
        tie = the_tie(cls)
        return tie_of(value) is not None and tie.peer.ask("isinstance", tie.number, value) is True

    def __subclasscheck__(cls, kind: Any) -> bool:
        if super().__subclasscheck__(kind):
            return True
        tie = the_tie(cls)
        is_ours = type(kind) is MirrorType
        return is_ours and tie.peer.ask("issubclass", tie.number, kind) is True


def _class_operation(name: str) -> Callable[..., Any]:
    def operation(cls: MirrorType, *args: Any) -> Any:
        tie = the_tie(cls)
        return tie.peer.ask("special", tie.number, name, args)

    return operation


# What the class of a class can offer: members of an Enum, ``Box[int]``.
for _name in ("__iter__", "__len__", "__getitem__", "__contains__", "__reversed__"):
    setattr(MirrorType, _name, _class_operation(_name))
# A class is true although it has a length to offer.
MirrorType.__bool__ = lambda cls: True  # type: ignore[attr-defined]


def is_own(name: str) -> bool:
    """Whether an attribute belongs to the proxy itself."""
    return name.startswith("__") and name.endswith("__") and name != "__dict__"


def ask_attribute(tie: Tie, name: str) -> Any:
    """An attribute of the other side's object.

    Raises:
      AttributeError: it has none of that name, or the name is not one that crosses.
      UnbelievableError: the object would make up an answer.
    """
    if name.startswith("__") and name.endswith("__") and name not in _ASKED:
        if name == "__signature__":
            return _signature(tie)
        raise AttributeError(name)
    refuse_if_derived(tie, name)
    value = tie.peer.ask("get", tie.number, name)
    if name[0].isupper():
        trust_class(value)
    return value


def _signature(tie: Tie) -> inspect.Signature:
    parameters = []
    for name, kind, has_default, default in tie.peer.ask("signature", tie.number):
        default = default if has_default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect._ParameterKind(kind), default=default))
    return inspect.Signature(parameters)


def _subclass(name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
    """A class that tests derive from one of the other side's lives there, with our methods."""
    peer = next(tie.peer for base in bases if (tie := tie_of(base)) is not None)
    cell = space.pop("__classcell__", None)
    own = {k: v for k, v in space.items() if k not in ("__module__", "__qualname__")}
    made = peer.ask("subclass", name, bases, own)
    if cell is not None:
        cell.cell_contents = made
    for kind in made.__mro__:
        if type(kind) is MirrorType and kind.__dict__[CLASS_TIE].peer is peer:
            _give_functions(kind)
    trust_class(made)
    return made


def _give_functions(kind: MirrorType) -> None:
    """Lets ``super()`` find the functions of a class that tests derive from."""
    tie = the_tie(kind)

    def give(name: str) -> None:
        def function(*args: Any, **kwargs: Any) -> Any:
            return tie.peer.ask("call_function", tie.number, name, args, kwargs)

        function.__name__ = name
        type.__setattr__(kind, name, function)

    for name in tie.peer.ask("functions", tie.number):
        if type(name) is str and (name == "__init__" or not name.startswith("__")):
            give(name)


def trust_class(value: Any) -> None:
    """The tests name this class: what they make of it are objects in their own eyes."""
    if type(value) is MirrorType:
        the_tie(value).how = How.MADE


def set_how(value: Any, how: How) -> None:
    """Says where an object came from, unless its word counts for nothing already."""
    tie = tie_of(value)
    if tie is not None and type(value) is not MirrorType and tie.how is not How.DERIVED:
        tie.how = how


def special(proxy: Any, name: str, *args: Any) -> Any:
    """What the other side's special method gives."""
    tie = the_tie(proxy)
    return tie.peer.ask("special", tie.number, name, args)


class UnbelievableError(TypeError):
    """An object of the student was asked for an answer that it could make up."""


def refuse_if_derived(tie: Tie, what: str) -> None:
    """No value is read from an object that the program's own operator made.

    Raises:
      UnbelievableError: it is one.
    """
    if tie.how is How.DERIVED and tie.peer.is_strict:
        raise UnbelievableError(
            f"{what} of an object that the program's own operator made out of plain data"
        )


def set_on_exception(error: BaseException, name: str, value: Any) -> None:
    """Sets an attribute of ours, even if the exception is a proxy."""
    BaseException.__setattr__(error, name, value)
