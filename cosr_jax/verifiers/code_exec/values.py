"""How each kind of plain value is written and read; fills the tables of ``wire``."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import re
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

from cosr_jax.verifiers.code_exec import known, wire
from cosr_jax.verifiers.code_exec.wire import (
    MAX_BYTES,
    MAX_NODES,
    Reader,
    TooLargeError,
    WireError,
    Writer,
)

_INT64 = range(-(1 << 63), 1 << 63)
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_C128 = struct.Struct("<dd")
_MAX_DECIMAL_CHARS = 100_000
_MAX_FRACTION_BITS = 1 << 20
_DTYPE = re.compile(r"[<>|=][biufcSUMm?][0-9]{1,9}(?:\[[0-9]{0,9}[a-zA-Z]{1,2}\])?")
_SMALL_FLOATS = re.compile(r"bfloat16|float8_[a-z0-9]+|int[24]|uint[24]|float[46]_[a-z0-9]+")


def _write_int(writer: Writer, value: int) -> None:
    if value in _INT64:
        writer.data += b"i"
        writer.data += _I64.pack(value)
    else:
        writer.data += b"I"
        writer.chunk(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _read_int(reader: Reader) -> int:
    data = reader.chunk()
    value = int.from_bytes(data, "little", signed=True)
    if value in _INT64 or len(data) != value.bit_length() // 8 + 1:
        raise WireError("an integer in a form that no writer makes")
    return value


def _write_float(writer: Writer, value: float) -> None:
    writer.data += b"f"
    writer.data += _F64.pack(value)


def _write_complex(writer: Writer, value: complex) -> None:
    writer.data += b"c"
    writer.data += _C128.pack(value.real, value.imag)


def _write_bytes(writer: Writer, value: bytes) -> None:
    writer.data += b"b"
    writer.chunk(value)


def _write_range(writer: Writer, value: range) -> None:
    writer.values(b"r", (value.start, value.stop, value.step))


def _write_slice(writer: Writer, value: slice) -> None:
    writer.values(b"/", (value.start, value.stop, value.step))


def _write_fraction(writer: Writer, value: fractions.Fraction) -> None:
    writer.values(b"Q", (value.numerator, value.denominator))


def _write_date(writer: Writer, value: datetime.date) -> None:
    writer.values(b"t", ("date", value.year, value.month, value.day))


def _write_timedelta(writer: Writer, value: datetime.timedelta) -> None:
    writer.values(b"t", ("timedelta", value.days, value.seconds, value.microseconds))


def _write_timezone(writer: Writer, value: datetime.timezone) -> None:
    writer.values(b"t", ("timezone", value.utcoffset(None)))


def _write_time(writer: Writer, value: datetime.time) -> None:
    if type(value.tzinfo) not in (types.NoneType, datetime.timezone):
        return writer.link.write_object(writer, value)
    fields = (value.hour, value.minute, value.second, value.microsecond, value.tzinfo, value.fold)
    writer.values(b"t", ("time", *fields))


def _write_datetime(writer: Writer, value: datetime.datetime) -> None:
    if type(value.tzinfo) not in (types.NoneType, datetime.timezone):
        return writer.link.write_object(writer, value)
    fields = (value.year, value.month, value.day, value.hour, value.minute, value.second)
    rest = (value.microsecond, value.tzinfo, value.fold)
    writer.values(b"t", ("datetime", *fields, *rest))


def _write_view(name: str) -> Callable[[Writer, Any], None]:
    def write(writer: Writer, value: Any) -> None:
        writer.values(b"v", (name, *value))

    return write


def _write_module(writer: Writer, value: types.ModuleType) -> None:
    name = types.ModuleType.__getattribute__(value, "__dict__").get("__name__")
    if type(name) is str and name in known.MODULES and sys.modules.get(name) is value:
        writer.text(b"m", name)
    else:
        writer.link.write_object(writer, value)


def write_from_library(writer: Writer, value: Any) -> bool:
    """Writes a plain value of a library that need not be loaded; says whether it was one."""
    kind = type(value)
    owner, name = kind.__module__, kind.__name__
    if kind is _loaded("uuid", "UUID"):
        writer.data += b"u" + value.bytes
    elif kind in (_loaded("pathlib", "PosixPath"), _loaded("pathlib", "PurePosixPath")):
        writer.text(b"p" if name == "PosixPath" else b"P", str(value))
    elif owner == "numpy" and issubclass(kind, _loaded("numpy", "generic") or ()):
        if (token := dtype_token(value.dtype)) is None:
            return False
        writer.text(b"g", token)
        writer.chunk(value.tobytes())
    elif name == "ArrayImpl" and str(owner).startswith("jaxlib"):
        try:
            plain = sys.modules["numpy"].asarray(value)
        except TypeError:  # a key array has no plain form
            return False
        if (token := dtype_token(plain.dtype)) is None:
            return False
        writer.text(b"J", token)
        writer.values(b"(", plain.shape)
        writer.chunk(plain.tobytes())
    else:
        return False
    return True


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def dtype_token(dtype: Any) -> str | None:
    """The name under which an array's type travels; None for records and objects."""
    if _SMALL_FLOATS.fullmatch(dtype.name):
        return dtype.name
    return dtype.str if _DTYPE.fullmatch(dtype.str) else None


def read_array(token: str, shape: Any, data: bytes) -> Any:
    """A NumPy array of its own memory.

    Raises:
      WireError: the parts do not fit together.
    """
    import numpy

    if _SMALL_FLOATS.fullmatch(token):
        import ml_dtypes

        scalar = getattr(ml_dtypes, token, None)
        if scalar is None:
            raise WireError(f"no array type {token!r}")
        dtype = numpy.dtype(scalar)
    elif _DTYPE.fullmatch(token):
        try:
            dtype = numpy.dtype(token)
        except TypeError as error:
            raise WireError(f"no array type {token!r}") from error
    else:
        raise WireError(f"no array type {token!r}")
    sizes = [n for n in shape if type(n) is int and 0 <= n <= MAX_BYTES]
    if type(shape) is not tuple or len(sizes) != len(shape) or len(shape) > 32:
        raise WireError("no shape of an array")
    count = 1
    for size in sizes:
        count *= size
    if count * dtype.itemsize != len(data):
        raise WireError("an array whose bytes are not of its shape")
    if dtype.itemsize == 0:  # arrays of empty strings have no bytes
        if count > MAX_NODES:
            raise TooLargeError(f"more than {MAX_NODES} values")
        return numpy.zeros(shape, dtype)
    return numpy.frombuffer(data, dtype).reshape(shape).copy()


def _read_scalar(reader: Reader) -> Any:
    token = reader.text()
    return read_array(token, (1,), reader.chunk())[0]


def _read_jax(reader: Reader) -> Any:
    token = reader.text()
    plain = read_array(token, reader.exact(tuple), reader.chunk())
    jax = sys.modules.get("jax")
    if jax is None and not reader.link.is_strict:
        import jax
    # Tests that use no JAX compare with NumPy; JAX is not loaded for them.
    return plain if jax is None else jax.numpy.asarray(plain)


def _read_bytes_number(code: str, size: int) -> Callable[[Reader], Any]:
    unpack = struct.Struct(code).unpack

    def read(reader: Reader) -> Any:
        return unpack(reader.take(size))[0]

    return read


def _read_decimal(reader: Reader) -> decimal.Decimal:
    text = reader.text()
    if len(text) > _MAX_DECIMAL_CHARS:
        raise TooLargeError("a decimal of too many digits")
    try:
        return decimal.Decimal(text)
    except decimal.DecimalException as error:
        raise WireError("a decimal that is none") from error


def _read_fraction(reader: Reader) -> fractions.Fraction:
    parts = reader.values()
    if [type(part) for part in parts] != [int, int] or parts[1] < 1:
        raise WireError("a fraction that is none")
    if max(part.bit_length() for part in parts) > _MAX_FRACTION_BITS:
        raise TooLargeError("a fraction of too many digits")
    return fractions.Fraction(*parts)


def _read_time(reader: Reader) -> Any:
    name, *fields = reader.values()
    plain = (int, types.NoneType, datetime.timezone, datetime.timedelta)
    if type(name) is not str or any(type(field) not in plain for field in fields):
        raise WireError("a time that is none")
    try:
        if name in ("date", "timezone"):
            return {"date": datetime.date, "timezone": datetime.timezone}[name](*fields)
        if name == "timedelta":
            days, seconds, microseconds = fields
            return datetime.timedelta(days, seconds, microseconds)
        *fields, fold = fields
        return {"time": datetime.time, "datetime": datetime.datetime}[name](*fields, fold=fold)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError("a time that is none") from error


def _read_view(reader: Reader) -> Any:
    name, *items = reader.values()
    try:
        if name == "keys":
            return dict.fromkeys(items).keys()
        if name == "values":
            return dict(enumerate(items)).values()
        if name == "items" and all(type(item) is tuple for item in items):
            return dict(items).items()
    except (TypeError, ValueError) as error:
        raise WireError("a view that is none") from error
    raise WireError("a view that is none")


def _read_integers(make: Callable[..., Any], kinds: tuple[type, ...]) -> Callable[[Reader], Any]:
    def read(reader: Reader) -> Any:
        parts = reader.values()
        if len(parts) != 3 or (kinds and any(type(part) not in kinds for part in parts)):
            raise WireError("a range that is none")
        try:
            return make(*parts)
        except ValueError as error:
            raise WireError("a range that is none") from error

    return read


def _read_frozenset(reader: Reader) -> frozenset[Any]:
    items = reader.values()
    try:
        return frozenset(items)
    except TypeError as error:
        raise WireError("a set of what cannot be in one") from error


def _read_complex(reader: Reader) -> complex:
    return complex(*_C128.unpack(reader.take(16)))


def _read_known(reader: Reader) -> Any:
    name = reader.text()
    try:
        return known.lookup(name, reader.link.is_strict)
    except KeyError as error:
        raise WireError("an unknown name") from error


def _read_module(reader: Reader) -> types.ModuleType:
    try:
        return known.module(reader.text())
    except KeyError as error:
        raise WireError("an unknown module") from error


def _read_uuid(reader: Reader) -> Any:
    import uuid

    return uuid.UUID(bytes=reader.take(16))


def _read_path(kind: str) -> Callable[[Reader], Any]:
    def read(reader: Reader) -> Any:
        import pathlib

        return getattr(pathlib, kind)(reader.text())

    return read


def _read_twin(reader: Reader) -> Any:
    return reader.link.read_twin(reader.number())


def _constant(data: bytes) -> Callable[[Writer, Any], None]:
    def write(writer: Writer, value: Any) -> None:
        writer.data += data

    return write


def _twin(writer: Writer, value: Any) -> None:
    writer.link.write_twin(writer, value)


wire.WRITERS |= {
    types.NoneType: _constant(b"N"),
    bool: lambda writer, value: writer.data.extend(b"T" if value else b"F"),
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: lambda writer, value: writer.text(b"s", value),
    bytes: _write_bytes,
    tuple: lambda writer, value: writer.values(b"(", value),
    frozenset: lambda writer, value: writer.values(b"z", value),
    range: _write_range,
    slice: _write_slice,
    types.EllipsisType: _constant(b"e"),
    types.NotImplementedType: _constant(b"n"),
    decimal.Decimal: lambda writer, value: writer.text(b"D", str(value)),
    fractions.Fraction: _write_fraction,
    datetime.date: _write_date,
    datetime.time: _write_time,
    datetime.datetime: _write_datetime,
    datetime.timedelta: _write_timedelta,
    datetime.timezone: _write_timezone,
    type({}.keys()): _write_view("keys"),
    type({}.values()): _write_view("values"),
    type({}.items()): _write_view("items"),
    types.ModuleType: _write_module,
    list: _twin,
    dict: _twin,
    set: _twin,
    bytearray: _twin,
    collections.deque: _twin,
    collections.defaultdict: _twin,
    collections.OrderedDict: _twin,
    collections.Counter: _twin,
}

wire.READERS |= {
    ord(b"N"): lambda reader: None,
    ord(b"T"): lambda reader: True,
    ord(b"F"): lambda reader: False,
    ord(b"i"): _read_bytes_number("<q", 8),
    ord(b"I"): _read_int,
    ord(b"f"): _read_bytes_number("<d", 8),
    ord(b"c"): _read_complex,
    ord(b"s"): Reader.text,
    ord(b"b"): Reader.chunk,
    ord(b"("): lambda reader: tuple(reader.values()),
    ord(b"z"): _read_frozenset,
    ord(b"r"): _read_integers(range, (int,)),
    ord(b"/"): _read_integers(slice, ()),
    ord(b"e"): lambda reader: Ellipsis,
    ord(b"n"): lambda reader: NotImplemented,
    ord(b"D"): _read_decimal,
    ord(b"Q"): _read_fraction,
    ord(b"t"): _read_time,
    ord(b"v"): _read_view,
    ord(b"m"): _read_module,
    ord(b"u"): _read_uuid,
    ord(b"p"): _read_path("PosixPath"),
    ord(b"P"): _read_path("PurePosixPath"),
    ord(b"B"): _read_known,
    ord(b"g"): _read_scalar,
    ord(b"J"): _read_jax,
    ord(b"M"): _read_twin,
}
