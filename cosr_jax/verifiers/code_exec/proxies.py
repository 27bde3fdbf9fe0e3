"""Makes classes and objects that stand for those of the other process.

A class of the other side is mirrored by a class of ours, with the same bases as far as they cross:
``isinstance``, ``except`` and ``type(a) is type(b)`` work natively.  Special methods are copied as
requests (``methods``); all other attributes are asked for when used (``ties``).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cosr_jax.verifiers.code_exec import specials
from cosr_jax.verifiers.code_exec.methods import METHODS, call
from cosr_jax.verifiers.code_exec.ties import (
    CLASS_TIE,
    TIE,
    MirrorType,
    Tie,
    ask_attribute,
    is_own,
    set_on_exception,
    special,
    the_tie,
)

if TYPE_CHECKING:
    from cosr_jax.verifiers.code_exec.peer import Peer


class Mirrored:
    """What all proxies have in common."""

    def __getattr__(self, name: str) -> Any:
        return ask_attribute(the_tie(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if is_own(name):
            object.__setattr__(self, name, value)
        else:
            tie = the_tie(self)
            tie.peer.ask("set", tie.number, name, value)

    def __delattr__(self, name: str) -> None:
        tie = the_tie(self)
        tie.peer.ask("delete", tie.number, name)

    def __dir__(self) -> list[str]:
        tie = the_tie(self)
        return tie.peer.ask("dir", tie.number)

    def __copy__(self) -> Any:
        return special(self, "__copy__")

    def __deepcopy__(self, memo: Any) -> Any:
        return special(self, "__deepcopy__", None)

    def __del__(self) -> None:
        try:
            tie = the_tie(self)
        except AttributeError:  # it was never tied
            return
        tie.peer.release(tie.number)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return ask_attribute(the_tie(self), "__dict__")


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
    data_fields: tuple[str, ...] = (),
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
      data_fields: the fields of a dataclass.
    """
    tie.is_coroutine = hint == "coroutine"
    space: dict[str, Any] = {CLASS_TIE: tie, "__module__": "solution", "__doc__": doc}
    for key, is_callable in special.items():
        if key in METHODS:
            space[key] = METHODS[key] if is_callable else None
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
    if data_fields:
        space["__dataclass_fields__"] = {name: _data_field(name) for name in data_fields}
    extra = [value_base] if value_base is not None else []
    attempts = [
        [*_without_implied([*bases, *extra]), Mirrored],
        [Mirrored, *extra, *[b for b in bases if issubclass(b, BaseException)][:1]],
    ]
    try:
        return MirrorType(name, _ordered(attempts[0]), space)
    except TypeError:  # bases that do not fit together here
        return MirrorType(name, tuple(attempts[1]), space)


def _data_field(name: str) -> Any:
    """What ``dataclasses.asdict`` and its kin look for in a class."""
    field: Any = dataclasses.field()
    field.name = name
    field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
    return field


def _asking(name: str) -> Callable[[Any], Any]:
    def getter(self: Any) -> Any:
        tie = the_tie(self)
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
            return ask_attribute(the_tie(self), name)
        return object.__getattribute__(self, name)

    return getattribute


def make_instance(kind: type, tie: Tie, value: Any = None) -> Any:
    """A proxy of that class; ``value`` is what it carries of an unchangeable builtin."""
    if tie.base in specials.VALUE_BASES:
        proxy = tie.base.__new__(kind, value)
    else:
        proxy = object.__new__(kind)
    object.__setattr__(proxy, TIE, tie)
    return proxy


def make_exception(kind: type[BaseException], tie: Tie | None, args: tuple[Any, ...]) -> Any:
    """An exception of a mirrored class (with a tie) or of a builtin one."""
    if tie is not None:
        error = kind.__new__(kind, *args)
        set_on_exception(error, "args", args)
        set_on_exception(error, TIE, tie)
        return error
    try:
        return kind(*args)
    except Exception:  # its constructor wants other arguments than those it keeps
        error = kind.__new__(kind)
        error.args = args
        return error


def _code(self: Any) -> Any:
    """As much of a code object as tells coroutines and numbers of arguments."""
    tie = the_tie(self)
    names = ("co_flags", "co_argcount", "co_kwonlyargcount", "co_varnames", "co_name")
    return types.SimpleNamespace(**dict(zip(names, tie.peer.ask("code", tie.number), strict=True)))


def _function_type() -> type:
    """The mirror of plain functions: the most frequent class, made once."""
    space = {
        "__module__": "solution",
        CLASS_TIE: None,
        "__call__": call,
        "__class__": property(lambda self: types.FunctionType),
        "__code__": property(_code),
        **{key: property(_asking(key)) for key in ("__doc__", "__module__")},
    }
    return MirrorType("function", (Mirrored,), space)


FUNCTION = _function_type()


def make_module(peer: Peer) -> Any:
    """The other side's module: its object number 0."""
    return make_instance(_MODULE, Tie(peer, 0))


_MODULE = MirrorType("module", (Mirrored,), {"__module__": "solution", CLASS_TIE: None})
