"""Frames over a stream socket between T and S, with limits on what is taken in."""

from __future__ import annotations

import os
import struct

from cosr_jax.verifiers.code_exec.wire import MAX_BYTES, TooLargeError

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 16
#: Bytes that one side takes in over the whole case.
_MAX_TOTAL = 512 << 20


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """Blocking frames on a descriptor, which the channel owns."""

    def __init__(self, fd: int):
        self._fd = fd
        self._received = b""
        self._total = 0

    def send(self, data: bytes | bytearray) -> None:
        """Sends one frame.

        Raises:
          Closed: nobody will read it.
        """
        rest = memoryview(_LENGTH.pack(len(data)) + data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise Closed from error

    def receive(self) -> bytes:
        """The next frame.

        Raises:
          Closed: there is none any more.
          TooLargeError: it is larger than a message may be.
        """
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        self._total += length
        if length > 2 * MAX_BYTES or self._total > _MAX_TOTAL:
            raise TooLargeError("more data than a case may exchange")
        return self._take(length)

    def _take(self, size: int) -> bytes:
        if len(self._received) < size:
            parts, have = [self._received], len(self._received)
            while have < size:
                try:
                    part = os.read(self._fd, max(_CHUNK, min(size - have, 32 * _CHUNK)))
                except OSError as error:
                    raise Closed from error
                if not part:
                    raise Closed
                parts.append(part)
                have += len(part)
            self._received = b"".join(parts)
        data, self._received = self._received[:size], self._received[size:]
        return data
