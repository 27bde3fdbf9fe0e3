"""The system calls that Python does not offer, through the C library.

Numbers and constants are those of Linux's uapi headers; the calls named by number have the same
one on every architecture of the last ten years.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_UNBINDABLE, MS_PRIVATE = 4096, 16384, 1 << 17, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAP_DAC_READ_SEARCH = 1 << 2

SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_CAPABILITY_VERSION_3 = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(what: str, number: int, *arguments: int | bytes | ctypes._Pointer | None) -> int:
    """A raw system call; ``what`` names it in the error.

    Raises:
      OSError: the kernel refused.
    """
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(what, _libc.syscall(ctypes.c_long(number), *wide))


def prctl(option: int, value: int) -> None:
    """prctl(2) of one argument."""
    zero = ctypes.c_ulong(0)
    _checked(
        f"prctl({option})",
        _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero),
    )


def unshare(flags: int) -> None:
    """unshare(2): leaves the namespaces of ``flags`` for new ones."""
    _checked(f"unshare({flags:#x})", _libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2): joins the namespace behind ``fd``."""
    _checked("setns", _libc.setns(fd, kind))


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), os.fsencode(target), kind.encode())
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None)
    _checked(f"mount on {target}", result)


def bind(source: str, target: str) -> None:
    """Shows ``source`` and what is mounted below it at ``target``."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(MS_BIND | MS_REC), None
    )
    _checked(f"bind {source} on {target}", result)


def detach(target: str) -> None:
    """Unmounts ``target`` and all below; it goes for good when nobody uses it."""
    _checked(f"umount of {target}", _libc.umount2(os.fsencode(target), MNT_DETACH))


def make_read_only(target: str) -> None:
    """Makes the mount at ``target`` and all below read-only and blind to set-uid bits."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    syscall(
        "mount_setattr",
        SYS_MOUNT_SETATTR,
        _AT_FDCWD,
        os.fsencode(target),
        _AT_RECURSIVE,
        ctypes.addressof(attributes),
        ctypes.sizeof(attributes),
    )


_capset_header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_capset_data = (ctypes.c_uint32 * 6)()


def keep_capabilities(kept: int) -> None:
    """Gives up the capabilities of this process that are not in the mask ``kept`` (below 1 << 32).

    Without exec none comes back.
    """
    _capset_data[0] = _capset_data[1] = kept  # effective, permitted
    result = _libc.capset(ctypes.byref(_capset_header), ctypes.byref(_capset_data))
    _checked("capset", result)


def limit_arenas() -> None:
    """One malloc arena for all threads.

    Each further arena reserves 64 MiB of addresses, which would count against RLIMIT_AS.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-8, 1)  # M_ARENA_MAX
