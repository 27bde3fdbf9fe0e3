"""Frames between the host and its fork server, over one Unix stream socket.

A frame is a fixed header and a body; descriptors travel beside the first byte of their frame.  The
host trusts no frame further than its fixed fields and text: nothing is unpickled on either side.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: kind, number of descriptors, case, length of the body in bytes
HEADER = struct.Struct("<BHII")
#: member's index, status as of waitpid(2), CPU seconds, limit that ended it
EXIT = struct.Struct("<HidB")

NO_LIMIT, CPU_LIMIT, MEMORY_LIMIT, FILE_LIMIT = range(4)

READY, SPAWN, KILL, EXITED, FAILED, GONE = range(1, 7)

#: The kernel passes at most this many descriptors beside one message (SCM_MAX_FD).
MAX_FDS = 253
_CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message; ``fds`` belong to whoever reads it."""

    kind: int
    case: int
    body: bytes
    fds: tuple[int, ...] = ()


class Order(NamedTuple):
    """What the server must know to fork one member."""

    entry: str
    num_fds: int  # the first holds the argument, if that is not empty
    argument_size: int  # bytes
    memory_mb: int
    file_mb: int
    cpu_s: int


def encode(kind: int, case: int, body: bytes = b"", num_fds: int = 0) -> bytes:
    """A frame as it goes over the socket."""
    return HEADER.pack(kind, num_fds, case, len(body)) + body


def encode_orders(orders: Sequence[Order]) -> bytes:
    """The body of a SPAWN frame."""
    return json.dumps(orders).encode()


def decode_orders(body: bytes) -> list[Order]:
    """The inverse of ``encode_orders``."""
    return [Order(*fields) for fields in json.loads(body)]


class Reader:
    """Cuts what arrives on a non-blocking socket into frames."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._data = bytearray()
        self._fds: list[int] = []

    def frames(self) -> Iterator[Frame]:
        """The frames that are complete after one read; none if nothing has come.

        Raises:
          EOFError: the other side is gone.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _CHUNK, MAX_FDS)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._data += data
        self._fds += fds
        while len(self._data) >= HEADER.size:
            kind, num_fds, case, length = HEADER.unpack_from(self._data)
            end = HEADER.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[HEADER.size : end])
            del self._data[:end]
            taken, self._fds = tuple(self._fds[:num_fds]), self._fds[num_fds:]
            yield Frame(kind, case, body, taken)
