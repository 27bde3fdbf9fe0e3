"""Python's special methods: which ones cross, and what the owner of an object does for them."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}

_BINARY_NAMES = "add sub mul matmul truediv floordiv mod lshift rshift and xor or"
_INPLACE_NAMES = "iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ixor ior"
_BINARY = {
    **{name: getattr(operator, f"__{name}__") for name in _BINARY_NAMES.split()},
    "divmod": divmod,
    "pow": pow,
}

#: Operators with two operands that may give any value.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": function for name, function in _BINARY.items()},
    **{f"__{name}__": getattr(operator, name) for name in _INPLACE_NAMES.split()},
}


def _reflect(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, other: function(other, value)


for _name, _function in _BINARY.items():
    ARITHMETIC[f"__r{_name}__"] = _reflect(_function)


def _length_hint(value: Any) -> int:
    return operator.length_hint(value)


#: Everything else, as a function of the object and the arguments of the special method.
OTHERS: dict[str, Callable[..., Any]] = {
    "__bool__": bool,
    "__len__": len,
    "__length_hint__": _length_hint,
    "__iter__": iter,
    "__next__": next,
    "__reversed__": reversed,
    "__contains__": operator.contains,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__call__": lambda value, *args, **kwargs: value(*args, **kwargs),
    "__hash__": hash,
    "__str__": str,
    "__repr__": repr,
    "__format__": format,
    "__bytes__": bytes,
    "__int__": int,
    "__float__": float,
    "__complex__": complex,
    "__index__": operator.index,
    "__round__": round,
    "__trunc__": math.trunc,
    "__floor__": math.floor,
    "__ceil__": math.ceil,
    "__abs__": abs,
    "__neg__": operator.neg,
    "__pos__": operator.pos,
    "__invert__": operator.invert,
    "__copy__": copy.copy,
    "__deepcopy__": lambda value, memo: copy.deepcopy(value),
    "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, *info: type(value).__exit__(value, *info),
    "__array__": lambda value, *args: type(value).__array__(value),
    "__fspath__": lambda value: type(value).__fspath__(value),
    "__aiter__": aiter,
    # Coroutines run on the owner's event loop; see ``Peer``.
    "__await__": lambda value: value,
    "__anext__": anext,
    "__aenter__": lambda value: type(value).__aenter__(value),
    "__aexit__": lambda value, *info: type(value).__aexit__(value, *info),
}

ASYNC = frozenset(("__await__", "__anext__", "__aenter__", "__aexit__"))

ALL = {**COMPARISONS, **ARITHMETIC, **OTHERS}

#: Builtins whose subclasses carry a value that never changes: the value travels along.
VALUE_BASES: tuple[type, ...] = (int, float, complex, str, bytes, tuple, frozenset)
#: Builtins whose subclasses compare by contents that are asked for when needed.
CONTENT_BASES: tuple[type, ...] = (dict, list, set, bytearray)


def owners(kind: type) -> dict[str, bool]:
    """The special methods of a class beyond those of ``object`` and of its value's builtin.

    The value says whether the method can be called: False stands for ``__hash__ = None``.
    """
    found: dict[str, bool] = {}
    for name in ALL:
        for owner in kind.__mro__:
            if name in owner.__dict__:
                if owner is not object and owner not in VALUE_BASES:
                    found[name] = owner.__dict__[name] is not None
                break
    return found
