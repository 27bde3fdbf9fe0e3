"""Landlock: which files a process may still reach, by rules that it cannot take back.

Facts: Linux's uapi/linux/landlock.h and its documentation of ABI versions.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from cosr_jax.verifiers.sandbox import linux

#: Rights over files by the ABI that brought them: the first 13, then refer, truncate, device ioctl.
_RIGHTS_OF_ABI = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
#: Of directories only; a rule about a file may not name them.
_DIRECTORY_RIGHTS = _READ_DIR | 0x1FF0 | 1 << 13
_EXECUTE = 1 << 0
_MAKE_CHAR, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
_PRIVATE = ~(_EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK)
_TCP_ABI, _TCP = 4, 0b11  # bind, connect
_SCOPE_ABI, _SCOPES = 6, 0b11  # abstract Unix sockets, signals
_VERSION_FLAG, _PATH_BENEATH = 1, 1

#: Before it, a file may be truncated that may not be written.
MINIMUM_ABI = 3


def abi() -> int:
    """The kernel's Landlock version; 0 if it has none or it is switched off."""
    try:
        return linux.syscall("landlock", linux.SYS_LANDLOCK_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


class Ruleset:
    """Rules to be put on any number of times; everything that they do not name is forbidden.

    Args:
      readable: files and directories that may be read, with all below.
      devices: files that may be read and written.
      private: a directory where files may also be made, written and removed.

    Raises:
      OSError: the kernel has no Landlock, or a path is not there.
    """

    def __init__(self, readable: Sequence[str], devices: Sequence[str], private: str):
        version = abi()
        rights = max(value for since, value in _RIGHTS_OF_ABI.items() if since <= max(version, 1))
        self._rights = rights
        tcp = _TCP if version >= _TCP_ABI else 0
        scopes = _SCOPES if version >= _SCOPE_ABI else 0
        fields = (rights, tcp, scopes)
        size = 24 if version >= _SCOPE_ABI else 16 if version >= _TCP_ABI else 8
        attributes = struct.pack("@3Q", *fields)
        self._fd = linux.syscall(
            "landlock_create_ruleset", linux.SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0
        )
        for path in readable:
            self._allow(path, _READ_FILE | _READ_DIR)
        for path in devices:
            self._allow(path, _READ_FILE | _WRITE_FILE)
        self._allow(private, rights & _PRIVATE)

    def _allow(self, path: str, rights: int) -> None:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):  # noqa: PTH112 - as in namespaces
                rights &= ~_DIRECTORY_RIGHTS
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
            linux.syscall(
                "landlock_add_rule",
                linux.SYS_LANDLOCK_ADD_RULE,
                self._fd,
                _PATH_BENEATH,
                ctypes.addressof(rule),
                0,
            )
        finally:
            os.close(fd)

    def put_on(self) -> None:
        """Binds this thread and all that it makes, for good."""
        linux.syscall("landlock_restrict_self", linux.SYS_LANDLOCK_RESTRICT_SELF, self._fd, 0)
