"""The wire format: what is sent arrives as it was; what nobody sends is refused, unexecuted."""

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import math
import pathlib
import socket
import sys
import uuid

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cosr_jax.verifiers.code_exec import wire
from cosr_jax.verifiers.code_exec.channel import Channel, Closed
from cosr_jax.verifiers.code_exec.examiner import Examiner
from cosr_jax.verifiers.code_exec.peer import Lost
from cosr_jax.verifiers.code_exec.report import Report
from cosr_jax.verifiers.code_exec.student import Student


class Pair:
    """Both sides in one process; what one sends lies in the socket until the other reads it."""

    def __init__(self):
        self.tests_end, self.program_end = socket.socketpair()
        for each in (self.tests_end, self.program_end):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.examiner = Examiner(Channel(self.tests_end.fileno()), "f")
        self.student = Student(Channel(self.program_end.fileno()))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.tests_end.close()
        self.program_end.close()

    def to_tests(self, value):
        self.student._send(b"=", value)
        return self.examiner._receive()[1]

    def to_program(self, value):
        self.examiner._send(b"=", value)
        return self.student._receive()[1]

    def feed_tests(self, data):
        """Gives the tests' side a frame; it may answer ``WireError`` or make sense of it."""
        self.program_end.send(len(data).to_bytes(4, "little") + data)
        return self.examiner._receive()


def same(left, right):
    """Equal in value, type and order at every depth, with NaN equal to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return left.hex() == right.hex() or (math.isnan(left) and math.isnan(right))
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, decimal.Decimal):
        return left.as_tuple() == right.as_tuple()
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) for a, b in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, (list, tuple, collections.deque)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (
            right.dtype,
            right.shape,
            right.tobytes(),
        )
    if isinstance(left, np.generic):
        return (left.dtype, left.tobytes()) == (right.dtype, right.tobytes())
    return left == right


hashable = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 300), 1 << 300),
    st.floats(allow_nan=False),
    st.text(),
    st.characters(categories=("Cs",)),
    st.binary(),
    st.dates(),
    st.times(),
    st.datetimes(),
    st.timedeltas(),
    st.fractions(),
    st.uuids(),
    st.just(...),
    st.just(datetime.timezone(datetime.timedelta(hours=5))),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
    st.builds(pathlib.PurePosixPath, st.text(st.characters(blacklist_characters="\0"), max_size=5)),
)
scalars = hashable | st.one_of(
    st.floats(),
    st.complex_numbers(),
    st.decimals(),
    st.builds(slice, st.integers(), st.none(), st.integers()),
    st.builds(bytearray, st.binary()),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int16, st.integers(-9, 9)),
    st.sampled_from([int, len, ValueError, math.sqrt, str.upper, np.float64, NotImplemented, math]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=8),
        st.lists(st.floats(), min_size=8),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashable, inner, max_size=4),
        st.sets(hashable, max_size=4),
        st.frozensets(hashable, max_size=4),
        st.dictionaries(hashable, inner, max_size=4).map(collections.OrderedDict),
        st.dictionaries(hashable, inner, max_size=4).map(
            lambda d: collections.defaultdict(list, d)
        ),
        st.dictionaries(hashable, st.integers(0, 9), max_size=4).map(collections.Counter),
        st.builds(collections.deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 9)),
    ),
    max_leaves=20,
)


@settings(max_examples=250)
@given(values)
def test_values_arrive_as_they_were_in_both_directions(value):
    with Pair() as pair:
        assert same(pair.to_tests(value), value)
        assert same(pair.to_program(value), value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.zeros((0, 4), np.int8),
        np.array(5),
        np.array(["a", "bcd"]),
        np.array([b"x"]),
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.asfortranarray(np.arange(4).reshape(2, 2)),
        np.arange(3, dtype=">i4"),
        np.array([], dtype="<U0"),
        {1: 2}.keys(),
        {"a": 1}.items(),
        pathlib.Path("a/b"),
        uuid.UUID(int=7),
        fractions.Fraction(-3, 7),
        1 << 100_000,
        -(1 << 63),
        (1 << 63) - 1,
        -(1 << 63) - 1,
    ],
    ids=lambda value: type(value).__name__,
)
def test_single_values(value):
    with Pair() as pair:
        arrived = pair.to_tests(value)
        assert type(arrived) is type(value)
        assert arrived.tolist() == value.tolist() if isinstance(value, np.ndarray) else True
        if isinstance(value, np.ndarray):
            assert arrived.dtype == value.dtype and arrived.shape == value.shape
        else:
            assert arrived == value


def test_one_list_twice_stays_one_and_cycles_stay_cycles():
    with Pair() as pair:
        inner = [1]
        outer = [inner, inner]
        outer.append(outer)
        arrived = pair.to_tests(outer)
        assert arrived[0] is arrived[1] and arrived[2] is arrived
        assert pair.to_program(arrived) is outer


def test_changes_travel_with_the_next_message():
    with Pair() as pair:
        mine = {"a": [1], "b": np.zeros(2)}
        theirs = pair.to_tests(mine)
        theirs["a"].append(2)
        theirs["b"][0] = 5
        theirs["c"] = theirs["a"]
        pair.to_program(None)
        assert mine["a"] == [1, 2] and mine["b"].tolist() == [5, 0] and mine["c"] is mine["a"]
        mine["a"].clear()
        pair.to_tests(None)
        assert theirs["c"] == []


def test_containers_that_nobody_refers_to_are_forgotten():
    with Pair() as pair:
        for number in range(50):
            pair.to_tests([number, [number]])
        for _ in range(4):  # nested ones go after what holds them
            pair.to_tests(None)
            pair.to_program(None)
        assert len(pair.examiner._heap) == 0
        assert len(pair.student._heap) == 0


@pytest.mark.parametrize("depth", [10, wire.MAX_DEPTH + 1, 5000])
def test_deep_tuples_are_refused_and_the_conversation_goes_on(depth):
    deep = ()
    for _ in range(depth):
        deep = (deep,)
    with Pair() as pair:
        if depth < wire.MAX_DEPTH:
            assert pair.to_tests(deep) == deep
        else:
            with pytest.raises(wire.WireError):
                pair.to_tests([deep])
        assert pair.to_tests([1]) == [1]


def test_deep_lists_arrive():
    deep = []
    for _ in range(20_000):
        deep = [deep]
    with Pair() as pair:
        arrived = pair.to_tests(deep)
        for _ in range(20_000):
            (arrived,) = arrived
        assert arrived == []


class Watch:
    """Notes what a decoder must never do."""

    FORBIDDEN = ("exec", "compile", "open", "os.", "subprocess.", "socket.connect", "pickle.")

    def __init__(self):
        self.events = []
        self.is_on = False
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.is_on and event.startswith(self.FORBIDDEN):
            self.events.append(event)


WATCH = Watch()


def read_anything(data):
    """Feeds one frame to the tests' side; only its own errors may come of it."""
    with Pair() as pair:
        WATCH.events.clear()
        WATCH.is_on = True
        try:
            pair.feed_tests(data)
        except (wire.WireError, Lost, Closed):
            pass
        finally:
            WATCH.is_on = False
        assert not WATCH.events


HEAD = b"=" + bytes(4 * 4)  # nothing dropped, nothing released, nothing printed, no new container


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"B\x04\0\0\0eval")
@example(b"B\x0a\0\0\0__import__")
@example(b"B\x09\0\0\0numpy.foo")
@example(b"m\x02\0\0\0os")
@example(b"K\x01\0\0\0:\xff\xff\xff\xff")
@example(b"X\x04\0\0\0")
@example(b"(\xff\xff\xff\xff")
@example(b"I\x01\0\0\0\x01")
@example(b"z\x01\0\0\0M\x00\0\0\0")
def test_arbitrary_bytes_run_nothing(data):
    read_anything(data)
    read_anything(HEAD + data)


@settings(max_examples=200)
@given(values, st.data())
def test_damaged_messages_run_nothing(value, data):
    with Pair() as pair:
        pair.student._send(b"=", [value, ValueError("x", value), Student, lambda: 0])
        frame = bytearray(pair.tests_end.recv(1 << 22)[4:])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    read_anything(bytes(frame[: data.draw(st.integers(1, len(frame)))]))
    read_anything(bytes(frame))


@pytest.mark.parametrize(
    "data",
    [
        b"i\x01",  # ends early
        b"N" + b"N",  # goes on
        b"I\x01\0\0\0\x01",  # a small integer in the form of large ones
        b"(\xff\xff\xff\x7f",  # more items than bytes
        b"s\x01\0\0\0\xff",  # no text
        b"B\x04\0\0\0eval",  # acts on the reader's process
        b"m\x03\0\0\0pty",  # no module for tests
        b"M\x63\0\0\0",  # no such container
        b"Y\x63\0\0\0",  # no such object
        b"Q\x02\0\0\0i\x01\0\0\0\0\0\0\0i\0\0\0\0\0\0\0\0",  # 1/0
        b"z\x01\0\0\0/\x03\0\0\0NNN" if sys.version_info < (3, 12) else b"\xfe",  # unhashable
        b"g\x03\0\0\0<f8\x04\0\0\0\0\0\0\0",  # half a number
        b"g\x02\0\0\0|O\x08\0\0\0\0\0\0\0\0\0\0\0",  # an array of objects
    ],
)
def test_what_no_writer_makes_is_refused(data):
    with Pair() as pair, pytest.raises(wire.WireError):
        pair.feed_tests(HEAD + data + bytes(4))


def test_large_messages_are_refused_before_they_are_read():
    with Pair() as pair:
        pair.program_end.send((0xFFFFFFFF).to_bytes(4, "little"))
        with pytest.raises(wire.TooLargeError):
            pair.examiner._receive()


def test_too_many_values_are_refused():
    with Pair() as pair:
        count = 40
        block = array.array("q", [0] * 100).tobytes()
        body = b"(" + count.to_bytes(4, "little")
        body += (b"b" + len(block).to_bytes(4, "little") + block) * count
        reader = wire.Reader(body, pair.examiner)
        reader.count(wire.MAX_NODES - 10)
        with pytest.raises(wire.TooLargeError):
            reader.value()


@given(st.builds(Report, st.integers(), st.integers(), st.text("ab c", max_size=5)))
def test_reports_survive_their_line(report):
    line = report.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert Report.from_line(line[:-1]) == report


@given(st.binary())
def test_no_line_crashes_the_reader_of_reports(line):
    with contextlib.suppress(ValueError):
        assert isinstance(Report.from_line(line), Report)
