"""Classes and objects that stand for those of the other process.

A class of the other side is mirrored by a class of ours, with the same bases as far as they cross:
``isinstance``, ``except`` and ``type(a) is type(b)`` work natively.  Special methods are copied as
requests; all other attributes are asked for when used.  Which answers the tests' side believes is
decided here, in ``_Trust``.
"""

from __future__ import annotations

import enum
import inspect
import os
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cosr_jax.verifiers.code_exec import specials

if TYPE_CHECKING:
    from cosr_jax.verifiers.code_exec.peer import Peer

_TIE = "_cosr_tie"
_CLASS_TIE = "_cosr_class_tie"

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
        return type.__getattribute__(value, "__dict__")[_CLASS_TIE]
    if type(kind) is MirrorType:
        return object.__getattribute__(value, _TIE)
    return None


class MirrorType(type):
    """Class of the classes that mirror the other side's."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **kwargs: Any):
        if _CLASS_TIE in space:
            return super().__new__(cls, name, bases, space)
        return _subclass(name, bases, space)

    def __init__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **kwargs: Any):
        super().__init__(name, bases, space)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        tie = tie_of(cls)
        made = tie.peer.ask("call", tie.number, args, kwargs)
        _set_how(made, How.MADE if tie.how is How.MADE else How.RETURNED)
        return made

    def __getattr__(cls, name: str) -> Any:
        tie = tie_of(cls)
        return _ask_attribute(tie, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if _is_own(name):
            super().__setattr__(name, value)
        else:
            tie = tie_of(cls)
            tie.peer.ask("set", tie.number, name, value)

    def __delattr__(cls, name: str) -> None:
        tie = tie_of(cls)
        tie.peer.ask("delete", tie.number, name)

    def __dir__(cls) -> list[str]:
        tie = tie_of(cls)
        return tie.peer.ask("dir", tie.number)

    def __instancecheck__(cls, value: Any) -> bool:
        if super().__instancecheck__(value):
            return True
        tie = tie_of(cls)
        return tie_of(value) is not None and tie.peer.ask("isinstance", tie.number, value) is True

    def __subclasscheck__(cls, kind: Any) -> bool:
        if super().__subclasscheck__(kind):
            return True
        tie = tie_of(cls)
        is_ours = type(kind) is MirrorType
        return is_ours and tie.peer.ask("issubclass", tie.number, kind) is True


def _class_operation(name: str) -> Callable[..., Any]:
    def operation(cls: MirrorType, *args: Any) -> Any:
        tie = tie_of(cls)
        return tie.peer.ask("special", tie.number, name, args)

    return operation


# What the class of a class can offer: members of an Enum, ``Box[int]``.
for _name in ("__iter__", "__len__", "__getitem__", "__contains__", "__reversed__"):
    setattr(MirrorType, _name, _class_operation(_name))
# A class is true although it has a length to offer.
MirrorType.__bool__ = lambda cls: True  # type: ignore[attr-defined]


class Mirrored:
    """What all proxies have in common."""

    def __getattr__(self, name: str) -> Any:
        return _ask_attribute(tie_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_own(name):
            object.__setattr__(self, name, value)
        else:
            tie = tie_of(self)
            tie.peer.ask("set", tie.number, name, value)

    def __delattr__(self, name: str) -> None:
        tie = tie_of(self)
        tie.peer.ask("delete", tie.number, name)

    def __dir__(self) -> list[str]:
        tie = tie_of(self)
        return tie.peer.ask("dir", tie.number)

    def __copy__(self) -> Any:
        return _special(self, "__copy__")

    def __deepcopy__(self, memo: Any) -> Any:
        return _special(self, "__deepcopy__", None)

    def __del__(self) -> None:
        try:
            tie = tie_of(self)
        except AttributeError:  # it was never tied
            return
        tie.peer.release(tie.number)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return _ask_attribute(tie_of(self), "__dict__")


def _is_own(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__dict__"


def _ask_attribute(tie: Tie | None, name: str) -> Any:
    if tie is None:
        raise AttributeError(name)
    if name.startswith("__") and name.endswith("__") and name not in _ASKED:
        if name == "__signature__":
            return _signature(tie)
        raise AttributeError(name)
    _refuse_if_derived(tie, name)
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
    trust_class(made)
    return made


def trust_class(value: Any) -> None:
    """The tests name this class: what they make of it are objects in their own eyes."""
    if type(value) is MirrorType:
        tie_of(value).how = How.MADE


def _set_how(value: Any, how: How) -> None:
    tie = tie_of(value)
    if tie is not None and type(value) is not MirrorType and tie.how is not How.DERIVED:
        tie.how = how


def _special(proxy: Any, name: str, *args: Any) -> Any:
    tie = tie_of(proxy)
    return tie.peer.ask("special", tie.number, name, args)


class UnbelievableError(TypeError):
    """An object of the student was asked for an answer that it could make up."""


def _refuse_if_derived(tie: Tie, what: str) -> None:
    if tie.how is How.DERIVED and tie.peer.is_strict:
        raise UnbelievableError(
            f"{what} of an object that the program's own operator made out of plain data"
        )


def _compare(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        tie, theirs = tie_of(self), tie_of(other)
        if not tie.peer.is_strict:
            return _special(self, name, other)
        if theirs is not None:
            answer = _special(self, name, other)
            if name in ("__eq__", "__ne__") and type(answer) is bool:
                is_equal = answer is (name == "__eq__")
                if is_equal and not _is_believable(self, other):
                    return not answer
            return answer
        if tie.base is not None:
            return getattr(tie.base, name)(_plain(self, tie), other)
        if name in ("__eq__", "__ne__") or tie.how is not How.MADE:
            return NotImplemented
        return _special(self, name, other)

    return method


def _is_believable(left: Any, right: Any) -> bool:
    """Whether an object that calls itself equal to another knows what it says.

    It is asked about a text that it cannot have seen, and about an empty object of the other's
    class.  If it equals even that one, the attributes of both must be the same, for us to see.
    """
    tie = tie_of(left)
    answers = tie.peer.ask("probe", tie.number, right, os.urandom(8).hex())
    if answers == (False, False):
        return True
    if answers != (False, True) or type(left) is not type(right):
        return False
    try:
        return vars(left) == vars(right)
    except TypeError:
        return False


def _plain(proxy: Any, tie: Tie) -> Any:
    base = tie.base
    if base in specials.VALUE_BASES:
        return proxy
    plain = tie.peer.ask("plain", tie.number)
    if type(plain) is not base:
        raise UnbelievableError("contents that are not of the object's kind")
    return plain


def _arithmetic(name: str) -> Callable[..., Any]:
    def method(self: Any, other: Any, *modulus: Any) -> Any:
        tie, theirs = tie_of(self), tie_of(other)
        if not tie.peer.is_strict:
            return _special(self, name, other, *modulus)
        is_derived = tie.how is How.DERIVED or (theirs is not None and theirs.how is How.DERIVED)
        is_made = tie.how is How.MADE and (theirs is None or theirs.how is How.MADE)
        if theirs is None and not is_made and tie.base in specials.VALUE_BASES:
            return getattr(tie.base, name, _unsupported)(self, other, *modulus)
        result = _special(self, name, other, *modulus)
        if is_made and not is_derived:
            _set_how(result, How.MADE)
        elif is_derived or theirs is None:
            tie_of_result = tie_of(result)
            if tie_of_result is None or tie_of_result.base is not None:
                raise UnbelievableError(f"{name} of an object with plain data gave plain data")
            tie_of_result.how = How.DERIVED
        return result

    return method


def _unsupported(*operands: Any) -> Any:
    return NotImplemented


def _other(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        tie = tie_of(self)
        if name not in ("__str__", "__repr__", "__hash__", "__call__"):
            _refuse_if_derived(tie, name)
        return _special(self, name, *args)

    return method


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    tie = tie_of(self)
    _refuse_if_derived(tie, "call")
    return tie.peer.ask("call", tie.number, args, kwargs)


def _bool(self: Any) -> bool:
    tie = tie_of(self)
    _refuse_if_derived(tie, "truth")
    return _special(self, "__bool__")


def _contains(self: Any, item: Any) -> bool:
    tie = tie_of(self)
    _refuse_if_derived(tie, "membership")
    if not tie.peer.is_strict or tie.how is How.MADE or tie_of(item) is not None:
        return bool(_special(self, "__contains__", item))
    # What a function returned could contain everything: its items are looked at here.
    return any(mine is item or mine == item for mine in self)


def _enter(self: Any) -> Any:
    tie = tie_of(self)
    how = tie.how
    entered = _special(self, "__enter__")
    if tie_of(entered) is tie:
        tie.how = how
    return entered


def _exit(self: Any, kind: Any, error: Any, trace: Any) -> Any:
    tie = tie_of(self)
    answer = _special(self, "__exit__", kind, error, None)
    return answer and (not tie.peer.is_strict or tie.peer.may_swallow(error, trace))


def _array(self: Any, *args: Any, **kwargs: Any) -> Any:
    tie = tie_of(self)
    _refuse_if_derived(tie, "values")
    return _special(self, "__array__")


async def _await_remote(peer: Peer, number: int, name: str, args: tuple[Any, ...]) -> Any:
    return peer.ask("await", number, name, args)


def as_coroutine(peer: Peer, number: int) -> Any:
    """A coroutine of ours that runs one of the other side's, there, when it is awaited."""
    return _await_remote(peer, number, "__await__", ())


def _async(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        tie = tie_of(self)
        pending = _await_remote(tie.peer, tie.number, name, args)
        return pending.__await__() if name == "__await__" else pending

    return method


def _make_methods() -> dict[str, Callable[..., Any]]:
    methods: dict[str, Callable[..., Any]] = {}
    methods.update((name, _compare(name)) for name in specials.COMPARISONS)
    methods.update((name, _arithmetic(name)) for name in specials.ARITHMETIC)
    methods.update((name, _other(name)) for name in specials.OTHERS)
    methods.update((name, _async(name)) for name in specials.ASYNC)
    methods |= {
        "__bool__": _bool,
        "__call__": _call,
        "__contains__": _contains,
        "__enter__": _enter,
        "__exit__": _exit,
        "__array__": _array,
    }
    for name in ("__copy__", "__deepcopy__"):
        del methods[name]
    return methods


_METHODS = _make_methods()

#: Types of the interpreter for which a proxy passes with ``isinstance``.
HINTS: dict[str, type] = {
    "function": types.FunctionType,
    "method": types.MethodType,
    "builtin_function_or_method": types.BuiltinFunctionType,
    "generator": types.GeneratorType,
    "coroutine": types.CoroutineType,
    "async_generator": types.AsyncGeneratorType,
    "module": types.ModuleType,
    **{base.__name__: base for base in specials.CONTENT_BASES},
}


def make_class(
    tie: Tie,
    name: str,
    doc: str | None,
    bases: list[type],
    own: tuple[str, ...],
    special: dict[str, bool],
    hint: str,
) -> type:
    """Mirrors a class.

    Args:
      tie: its tie; ``tie.base`` is the builtin that its instances carry.
      name: for people.
      doc: its docstring.
      bases: mirrored classes and classes of exceptions.
      own: names in which its instances differ from those of the builtin that they carry.
      special: special methods, and whether they can be called.
      hint: a key of ``HINTS``, or "".
    """
    tie.is_coroutine = hint == "coroutine"
    space: dict[str, Any] = {_CLASS_TIE: tie, "__module__": "solution", "__doc__": doc}
    for key, is_callable in special.items():
        if key in _METHODS:
            space[key] = _METHODS[key] if is_callable else None
    if "__eq__" in space and "__hash__" not in space:
        space["__hash__"] = Mirrored.__hash__
    value_base = tie.base if tie.base in specials.VALUE_BASES else None
    if value_base is not None:
        # Plain data and a set's or dict's idea of it must never disagree.
        space["__hash__"] = value_base.__hash__
        space["__getattribute__"] = _getattribute_of(frozenset(own))
    if hint in HINTS:
        kind = HINTS[hint]
        space["__class__"] = property(lambda self: kind)
        if hint in ("function", "method", "builtin_function_or_method"):
            for key in ("__doc__", "__module__"):
                space[key] = property(_asking(key))
    extra = [value_base] if value_base is not None else []
    attempts = [
        [*_without_implied([*bases, *extra]), Mirrored],
        [Mirrored, *extra, *[b for b in bases if issubclass(b, BaseException)][:1]],
    ]
    try:
        return MirrorType(name, _ordered(attempts[0]), space)
    except TypeError:  # bases that do not fit together here
        return MirrorType(name, tuple(attempts[1]), space)


def _asking(name: str) -> Callable[[Any], Any]:
    def getter(self: Any) -> Any:
        tie = tie_of(self)
        return tie.peer.ask("get", tie.number, name)

    return getter


def _without_implied(bases: list[type]) -> list[type]:
    """Each base but those that another one is derived from already."""
    found: list[type] = []
    for base in bases:
        if base not in found and not any(b is not base and base in b.__mro__ for b in bases):
            found.append(base)
    return found


def _ordered(bases: list[type]) -> tuple[type, ...]:
    """Mirrored classes first, then ``Mirrored``, then builtins: a proxy's methods come first."""
    mirrored = [base for base in bases if type(base) is MirrorType]
    builtin = [base for base in bases if type(base) is not MirrorType and base is not Mirrored]
    middle = [] if any(Mirrored in base.__mro__ for base in mirrored) else [Mirrored]
    return (*mirrored, *middle, *builtin)


def _getattribute_of(own: frozenset[str]) -> Callable[[Any, str], Any]:
    """The student's own ``upper`` of a subclass of str comes before that of str."""

    def getattribute(self: Any, name: str) -> Any:
        if name in own:
            return _ask_attribute(tie_of(self), name)
        return object.__getattribute__(self, name)

    return getattribute


def make_instance(kind: type, tie: Tie, value: Any = None) -> Any:
    """A proxy of that class; ``value`` is what it carries of an unchangeable builtin."""
    if tie.base in specials.VALUE_BASES:
        proxy = tie.base.__new__(kind, value)  # type: ignore[misc]
    else:
        proxy = object.__new__(kind)
    object.__setattr__(proxy, _TIE, tie)
    return proxy


def make_exception(kind: type[BaseException], tie: Tie | None, args: tuple[Any, ...]) -> Any:
    """An exception of a mirrored class (with a tie) or of a builtin one."""
    if tie is not None:
        error = kind.__new__(kind, *args)
        set_on_exception(error, "args", args)
        set_on_exception(error, _TIE, tie)
        return error
    try:
        return kind(*args)
    except Exception:  # its constructor wants other arguments than those it keeps
        error = kind.__new__(kind)
        error.args = args
        return error


def set_on_exception(error: BaseException, name: str, value: Any) -> None:
    """Sets an attribute of ours, even if the exception is a proxy."""
    BaseException.__setattr__(error, name, value)


def _function_type() -> type:
    """The mirror of plain functions: the most frequent class, made once."""
    space = {
        "__module__": "solution",
        _CLASS_TIE: None,
        "__call__": _call,
        "__class__": property(lambda self: types.FunctionType),
        **{key: property(_asking(key)) for key in ("__doc__", "__module__")},
    }
    return MirrorType("function", (Mirrored,), space)


FUNCTION = _function_type()


def make_module(peer: Peer) -> Any:
    """The other side's module: its object number 0."""
    return make_instance(_MODULE, Tie(peer, 0))


_MODULE = MirrorType("module", (Mirrored,), {"__module__": "solution", _CLASS_TIE: None})
