"""Special methods of proxies: requests to the other side, and which answers the tests believe.

On the student's side everything is believed.  On the tests' side an operator of the student is
asked for a value only where it cannot have been made up; see the package for the rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cosr_jax.verifiers.code_exec import specials
from cosr_jax.verifiers.code_exec.ties import (
    How,
    Tie,
    UnbelievableError,
    refuse_if_derived,
    set_how,
    special,
    the_tie,
    tie_of,
)

if TYPE_CHECKING:
    from cosr_jax.verifiers.code_exec.peer import Peer


def _compare(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        tie, theirs = the_tie(self), tie_of(other)
        if not tie.peer.is_strict:
            return special(self, name, other)
        if theirs is not None:
            answer = special(self, name, other)
            if name == "__eq__" and answer and not _is_believable(self, other):
                return False
            if name == "__ne__" and not answer and not _is_believable(self, other):
                return True
            return answer
        if tie.base is not None:
            return getattr(tie.base, name)(_plain(self, tie), other)
        if name in ("__eq__", "__ne__") or tie.how is not How.MADE:
            return NotImplemented
        return special(self, name, other)

    return method


def _is_believable(left: Any, right: Any) -> bool:
    """Whether an object that calls itself equal to another knows what it says.

    It is asked about a text that it cannot have seen, and about an empty object of the other's
    class.  If it equals even that one, the attributes of both must be the same, for us to see.
    """
    tie = the_tie(left)
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
        tie, theirs = the_tie(self), tie_of(other)
        if not tie.peer.is_strict:
            return special(self, name, other, *modulus)
        is_derived = tie.how is How.DERIVED or (theirs is not None and theirs.how is How.DERIVED)
        is_made = tie.how is How.MADE and (theirs is None or theirs.how is How.MADE)
        if theirs is None and not is_made and tie.base in specials.VALUE_BASES:
            return getattr(tie.base, name, _unsupported)(self, other, *modulus)
        result = special(self, name, other, *modulus)
        if is_made and not is_derived:
            set_how(result, How.MADE)
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
        tie = the_tie(self)
        if name not in ("__str__", "__repr__", "__hash__", "__call__"):
            refuse_if_derived(tie, name)
        return special(self, name, *args)

    return method


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the other side's object."""
    tie = the_tie(self)
    refuse_if_derived(tie, "call")
    return tie.peer.ask("call", tie.number, args, kwargs)


def _bool(self: Any) -> bool:
    tie = the_tie(self)
    refuse_if_derived(tie, "truth")
    return special(self, "__bool__")


def _contains(self: Any, item: Any) -> bool:
    tie = the_tie(self)
    refuse_if_derived(tie, "membership")
    if not tie.peer.is_strict or tie.how is How.MADE or tie_of(item) is not None:
        return bool(special(self, "__contains__", item))
    # What a function returned could contain everything: its items are looked at here.
    return any(mine is item or mine == item for mine in self)


def _enter(self: Any) -> Any:
    tie = the_tie(self)
    how = tie.how
    entered = special(self, "__enter__")
    if tie_of(entered) is tie:
        tie.how = how
    return entered


def _exit(self: Any, kind: Any, error: Any, trace: Any) -> Any:
    tie = the_tie(self)
    answer = special(self, "__exit__", kind, error, None)
    return answer and (not tie.peer.is_strict or tie.peer.may_swallow(error, trace))


def _array(self: Any, *args: Any, **kwargs: Any) -> Any:
    tie = the_tie(self)
    refuse_if_derived(tie, "values")
    return special(self, "__array__")


async def _await_remote(peer: Peer, number: int, name: str, args: tuple[Any, ...]) -> Any:
    return peer.ask("await", number, name, args)


def as_coroutine(peer: Peer, number: int) -> Any:
    """A coroutine of ours that runs one of the other side's, there, when it is awaited."""
    return _await_remote(peer, number, "__await__", ())


def _async(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        tie = the_tie(self)
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
        "__call__": call,
        "__contains__": _contains,
        "__enter__": _enter,
        "__exit__": _exit,
        "__array__": _array,
    }
    for name in ("__copy__", "__deepcopy__"):
        del methods[name]
    return methods


#: The special methods that a class can be given, by name.
METHODS = _make_methods()
