# ruff: noqa: SIM905
"""Which system calls a sandbox leaves: two filters that are built once and stack.

The first is a list of what is allowed, and binds the server from the moment it is warm: whatever it
does not name fails with EPERM for the server and for everything forked from it.  The second binds a
member and takes away what only the server needs.  Two filters, because a short one is quicker to
load, and one is loaded for every case.

Programs are classic BPF (seccomp(2)); the inherited one is cached by the kernel for calls that are
allowed whatever their arguments.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from cosr_jax.verifiers.sandbox import linux
from cosr_jax.verifiers.sandbox.syscalls import ARCHITECTURES, numbers

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_KILL, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X32 = 0x4000_0000

_SET_MODE_FILTER, _FLAG_SPEC_ALLOW = 1, 4

_ALWAYS = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range
    open openat creat lseek dup dup2 dup3 pipe pipe2 stat lstat fstat newfstatat statx access
    faccessat faccessat2 getdents getdents64 getcwd chdir fchdir readlink readlinkat statfs
    fstatfs umask mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat
    symlink symlinkat truncate ftruncate fallocate fsync fdatasync fadvise64 copy_file_range
    sendfile getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
    mmap munmap mremap mprotect madvise msync brk
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend
    sigaltstack restart_syscall pause alarm getitimer setitimer futex get_robust_list
    set_robust_list set_tid_address rseq sched_yield sched_getaffinity sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu clock_gettime
    clock_getres clock_nanosleep nanosleep gettimeofday time times
    getrusage getrlimit getpriority getpid gettid getppid getpgrp getpgid getsid getuid geteuid
    getgid getegid getresuid getresgid getgroups capget uname sysinfo getrandom
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    epoll_pwait2 eventfd eventfd2 recvfrom shutdown getsockname getpeername getsockopt wait4
    waitid exit exit_group
""".split()

#: Changes of modes and times: harmless where everything but the private directory is read-only.
_ATTRIBUTES = "chmod fchmod fchmodat utime utimes utimensat futimesat".split()

#: Left to the server, taken from its members.
_SERVER_ONLY = """
    sendmsg recvmsg pidfd_open seccomp unshare setns mount umount2 chroot
    capset landlock_create_ruleset landlock_add_rule landlock_restrict_self
""".split()

_TERMINAL_QUERIES = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS ... FIOCLEX
# Duplicate, flags, record locks, size of a pipe; not F_SETOWN, which sends signals to others.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_THREAD = 0x0001_0900  # CLONE_THREAD | CLONE_SIGHAND | CLONE_VM
_NAMESPACES = 0x7E02_0080  # every CLONE_NEW*
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_SIGKILL, _RLIMIT_CPU = 9, 0
_PID = 0x5049_4421  # stands for the member's process id; above every real one

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def _low(argument: int) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _high(argument: int) -> _Instruction:
    return (_LOAD, 0, 0, 20 + 8 * argument)


def _fail(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


_allow: _Instruction = (_RETURN, 0, 0, _ALLOW)
_deny = _fail(errno.EPERM)


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allows the call if the low half of the argument is one of ``values``."""
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_low(argument), *tests, _deny, _allow]


def _is_null(argument: int) -> list[_Instruction]:
    return [_low(argument), (_EQUAL, 0, 2, 0), _high(argument), (_EQUAL, 1, 0, 0), _deny, _allow]


def _to_self(signal_argument: int) -> list[_Instruction]:
    return [
        _low(0),
        (_EQUAL, 0, 2, _PID),
        _low(signal_argument),
        (_EQUAL, 0, 1, _SIGKILL),
        _deny,
        _allow,
    ]


def _program(rules: dict[str, list[_Instruction]], default: _Instruction) -> list[_Instruction]:
    """Judges the loaded number by ``rules``; calls that the machine lacks are left out."""
    known = numbers()
    program = []
    for name, rule in rules.items():
        if name in known:
            program += [(_EQUAL, 0, len(rule), known[name]), *rule]
    return [*program, default]


def server_program() -> bytes:
    """The filter that the warm server puts on."""
    rules = {name: [_allow] for name in (*_ALWAYS, *_ATTRIBUTES)}
    others = [*_SERVER_ONLY, "kill", "tgkill", "clone", "sendto", "prctl", "prlimit64", "setrlimit"]
    rules |= {name: [_allow] for name in others}
    rules |= {
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _TERMINAL_QUERIES),
        "socketpair": [
            _low(0),
            (_EQUAL, 0, 3, _AF_UNIX),
            _low(1),
            (_AND, 0, 0, _SOCK_TYPE),
            (_EQUAL, 1, 0, _SOCK_STREAM),
            _deny,
            _allow,
        ],
        # Its flags lie in memory, where a filter cannot look; the C library falls back to clone.
        "clone3": [_fail(errno.ENOSYS)],
    }
    head: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, ARCHITECTURES[platform.machine()][0]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _deny,
    ]
    return _pack([*head, *_program(rules, _deny)])


def member_program(may_change_attributes: bool) -> bytes:
    """The filter that a member adds to the server's, for ``Filter.of_process`` to complete.

    Args:
      may_change_attributes: whether chmod and utime are left, which Landlock does not restrict.
    """
    rules = {name: [_deny] for name in _SERVER_ONLY}
    if not may_change_attributes:
        rules |= {name: [_deny] for name in _ATTRIBUTES}
    rules |= {
        "clone": [
            _low(0),
            (_ANY_BIT, 3, 0, _NAMESPACES),
            (_AND, 0, 0, _THREAD),
            (_EQUAL, 0, 1, _THREAD),
            _allow,
            _deny,
        ],
        # Not SIGKILL: where nobody else can send it, it tells of trouble outside the sandbox.  For
        # the same reason the limit of processor time stays as it is, and POSIX timers are out.
        "kill": _to_self(signal_argument=1),
        "tgkill": _to_self(signal_argument=2),
        "setrlimit": [_low(0), (_EQUAL, 0, 1, _RLIMIT_CPU), _deny, _allow],
        "prlimit64": [
            _low(0),
            (_EQUAL, 0, 6, 0),
            _low(1),
            (_EQUAL, 0, 5, _RLIMIT_CPU),
            _low(2),
            (_EQUAL, 0, 2, 0),  # no new value: only asks
            _high(2),
            (_EQUAL, 1, 0, 0),
            _deny,
            _allow,
        ],
        "sendto": _is_null(4),
        "prctl": _one_of(0, (_PR_SET_NAME, _PR_GET_NAME)),
    }
    return _pack([(_LOAD, 0, 0, _NUMBER), *_program(rules, _allow)])


def _pack(program: list[_Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class Filter:
    """A program ready to be put on.  The process must have given up new privileges."""

    def __init__(self, program: bytes):
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._header = struct.pack("@HP", len(program) // 8, ctypes.addressof(self._buffer))
        self._seccomp = numbers()["seccomp"]
        operands = range(4, len(program), 8)
        self._pids = [i for i in operands if struct.unpack_from("<I", program, i)[0] == _PID]
        self._pid = _PID

    def of_process(self, pid: int) -> Filter:
        """This filter, made to fit the process ``pid``; quick where it does already."""
        if pid != self._pid:
            for offset in self._pids:
                struct.pack_into("<I", self._buffer, offset, pid)
            self._pid = pid
        return self

    def put_on(self) -> None:
        """Binds this thread and all that it makes, for good.

        The flag keeps old kernels from slowing the process down against Spectre: it holds nothing
        that it may not know.

        Raises:
          OSError: the kernel has no seccomp filters.
        """
        linux.syscall("seccomp", self._seccomp, _SET_MODE_FILTER, _FLAG_SPEC_ALLOW, self._header)
