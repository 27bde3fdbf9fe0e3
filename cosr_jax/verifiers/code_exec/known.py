"""What travels by name: each side looks the name up in its own, unpatched tables.

The tables are filled when the module is imported, in the warm server, before any student code runs.
"""

from __future__ import annotations

import builtins
import cmath
import collections
import decimal
import fractions
import importlib
import math
import operator
import os
import re
import sys
import types
from typing import Any

#: Builtins that act on the caller's own process.  T never takes them from S by name.
_ACTING_NAMES = """
    __import__ breakpoint compile copyright credits delattr dir eval exec exit getattr globals
    hasattr help id input license locals open print quit setattr super vars
"""
_ACTING = frozenset(_ACTING_NAMES.split())

#: Modules that the student's names may stand for; tests then use T's own.
_MODULE_LIST = """
    abc array base64 binascii bisect calendar cmath collections collections.abc contextlib copy
    dataclasses datetime decimal enum fractions functools hashlib heapq html inspect io itertools
    json math numbers numpy numpy.linalg numpy.testing operator os pprint queue random re statistics
    string struct sys textwrap time traceback types typing unicodedata uuid warnings zlib
"""
MODULES = frozenset(_MODULE_LIST.split())

#: Short names that everybody gives to a module.
_SHORT = {"np": "numpy", "jnp": "jax.numpy", "pd": "pandas"}
#: Names that tests expect to be modules: nothing else of the student's ever takes them.
MODULE_NAMES = frozenset(sys.stdlib_module_names) | {*_SHORT, "numpy", "jax", "pytest"}

_METHOD_OWNERS = (bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
_OTHER_TYPES = (
    collections.Counter,
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    decimal.Decimal,
    fractions.Fraction,
)
_EXCEPTION_LIST = """
    asyncio.exceptions.CancelledError asyncio.exceptions.InvalidStateError asyncio.queues.QueueEmpty
    asyncio.queues.QueueFull binascii.Error dataclasses.FrozenInstanceError decimal.DivisionByZero
    decimal.InvalidOperation json.decoder.JSONDecodeError _queue.Empty queue.Full re.error
    statistics.StatisticsError struct.error zlib.error
"""
_OTHER_EXCEPTIONS = frozenset(_EXCEPTION_LIST.split())


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
    return values, exceptions


VALUES, EXCEPTIONS = _tables()
_NAMES = {id(value): name for table in (VALUES, EXCEPTIONS) for name, value in table.items()}
_NUMPY_TYPE = re.compile(r"numpy\.[a-z]+[0-9]*_?")


def name_of(value: Any, is_strict: bool) -> str | None:
    """The name under which a builtin, an exception class or a NumPy scalar type travels.

    None if it has none, or if a strict reader (see ``lookup``) would refuse it.
    """
    name = _NAMES.get(id(value))
    if name is not None:
        return None if is_strict and name in _ACTING else name
    if not issubclass(type(value), type) or type(value.__module__) is not str:
        return None
    name = f"{value.__module__}.{value.__name__}"
    if name in _OTHER_EXCEPTIONS or value.__module__ == "numpy":
        return name if _from_library(name) is value else None
    return None


def lookup(name: str, is_strict: bool) -> Any:
    """The object that travels under that name.

    Args:
      name: as ``name_of`` says it.
      is_strict: refuse builtins that act on this process.

    Raises:
      KeyError: there is none.
    """
    if is_strict and name in _ACTING:
        raise KeyError(name)
    found = EXCEPTIONS.get(name) or VALUES.get(name) or _from_library(name)
    if found is None:
        raise KeyError(name)
    return found


def _from_library(name: str) -> Any:
    if name in _OTHER_EXCEPTIONS:
        owner, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(owner), attribute)
    if not _NUMPY_TYPE.fullmatch(name):
        return None
    import numpy

    value = getattr(numpy, name.removeprefix("numpy."), None)
    is_type = isinstance(value, type) and issubclass(value, (numpy.generic, numpy.ndarray))
    return value if is_type else None


def prepare_libraries(source: str) -> None:
    """Sets what libraries that ``source`` mentions need inside a sandbox."""
    if "jax" in source:  # it would look for accelerators that are out of reach, and may abort
        os.environ["JAX_PLATFORMS"] = "cpu"


def is_module_called(value: Any, name: str) -> bool:
    """Whether ``value`` is the module that is customarily imported as ``name``.

    ``import numpy as math`` would lend tests a more lenient ``isclose``.
    """
    if type(value) is not types.ModuleType:
        return False
    return value.__name__ == _SHORT.get(name, name) or value.__name__.endswith(f".{name}")


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
