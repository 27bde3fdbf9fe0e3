"""What travels by name: each side looks the name up in its own, unpatched tables.

The tables are filled when the module is imported, in the warm server, before any student code runs.
"""

from __future__ import annotations

import asyncio
import binascii
import builtins
import cmath
import collections
import concurrent.futures
import dataclasses
import decimal
import fractions
import importlib
import json
import math
import operator
import queue
import re
import statistics
import struct
import sys
import types
import zlib
from typing import Any

#: Builtins that act on the caller's own process.  T never takes them from S by name.
_ACTING = frozenset(
    "__import__ breakpoint compile delattr dir eval exec exit getattr globals hasattr help id input"
    " locals open print quit setattr super vars copyright credits license".split()
)

#: Modules that the student's names may stand for; tests then use T's own.
MODULES = frozenset(
    "array bisect cmath collections collections.abc copy dataclasses datetime decimal enum"
    " fractions functools heapq itertools json math operator random re statistics string time"
    " types typing numpy numpy.linalg numpy.testing".split()
)

#: Names that tests expect to be modules: the student's objects never take them.
MODULE_NAMES = frozenset(sys.stdlib_module_names) | {"np", "numpy", "jnp", "jax", "pytest", "pd"}

_METHOD_OWNERS = (bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
_OTHER_TYPES = (
    collections.Counter,
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    decimal.Decimal,
    fractions.Fraction,
)
_OTHER_EXCEPTIONS = (
    asyncio.CancelledError,
    asyncio.InvalidStateError,
    asyncio.QueueEmpty,
    asyncio.QueueFull,
    binascii.Error,
    concurrent.futures.BrokenExecutor,
    dataclasses.FrozenInstanceError,
    decimal.DivisionByZero,
    decimal.InvalidOperation,
    json.JSONDecodeError,
    queue.Empty,
    queue.Full,
    re.error,
    statistics.StatisticsError,
    struct.error,
    zlib.error,
)


def _tables() -> tuple[dict[str, Any], dict[str, type[BaseException]]]:
    values: dict[str, Any] = {}
    exceptions: dict[str, type[BaseException]] = {}
    for name, value in vars(builtins).items():
        if isinstance(value, type) and issubclass(value, BaseException):
            exceptions.setdefault(value.__name__, value)
        elif isinstance(value, (type, types.BuiltinFunctionType)) and name[0] != "_":
            values[name] = value
    for module in (math, cmath, operator):
        for name, value in vars(module).items():
            if callable(value) and name[0] != "_":
                values[f"{module.__name__}.{name}"] = value
    for owner in _METHOD_OWNERS:
        for name in vars(owner):
            if name[0] != "_" and callable(getattr(owner, name)):
                values[f"{owner.__name__}.{name}"] = getattr(owner, name)
    for kind in _OTHER_TYPES:
        values[f"{kind.__module__}.{kind.__name__}"] = kind
    values["NoneType"] = type(None)
    for error in _OTHER_EXCEPTIONS:
        exceptions[f"{error.__module__}.{error.__name__}"] = error
    return values, exceptions


VALUES, EXCEPTIONS = _tables()
_NAME_OF_VALUE = {id(value): name for name, value in VALUES.items()}
_NAME_OF_EXCEPTION = {id(value): name for name, value in EXCEPTIONS.items()}
_NUMPY_TYPE = re.compile(r"numpy\.[a-z]+[0-9]*_?")


def name_of(value: Any, is_strict: bool) -> str | None:
    """The name under which a builtin, an exception class or a NumPy scalar type travels.

    None if it has none, or if a strict reader (see ``lookup``) would refuse it.
    """
    name = _NAME_OF_VALUE.get(id(value)) or _NAME_OF_EXCEPTION.get(id(value))
    if is_strict and name in _ACTING:
        return None
    if name is None and type(value) is type and value.__module__ == "numpy":
        name = f"numpy.{value.__name__}"
        if _numpy_type(name) is not value:
            return None
    return name


def lookup(name: str, is_strict: bool) -> Any:
    """The object that travels under that name.

    Args:
      name: as ``name_of`` says it.
      is_strict: refuse builtins that act on this process.

    Raises:
      KeyError: there is none.
    """
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    if name in VALUES:
        if is_strict and name in _ACTING:
            raise KeyError(name)
        return VALUES[name]
    value = _numpy_type(name)
    if value is None:
        raise KeyError(name)
    return value


def _numpy_type(name: str) -> Any:
    if "numpy" not in sys.modules or not _NUMPY_TYPE.fullmatch(name):
        return None
    numpy = sys.modules["numpy"]
    value = getattr(numpy, name.removeprefix("numpy."), None)
    is_scalar = isinstance(value, type) and issubclass(value, (numpy.generic, numpy.ndarray))
    return value if is_scalar else None


def module(name: str) -> types.ModuleType:
    """This process's own module of that name.

    Raises:
      KeyError: tests do not get such a module from a student.
    """
    if name not in MODULES:
        raise KeyError(name)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise KeyError(name) from error
