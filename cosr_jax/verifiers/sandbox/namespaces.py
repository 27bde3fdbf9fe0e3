# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH114, PTH115, PTH116, PTH120, PTH208, PTH211
"""Isolation by namespaces: a root of read-only binds, and for each member its own processes.

Two steps lead there.  ``build_root`` leaves the machine for a root that shows only what Python
needs; bubblewrap does the same from outside.  ``settle`` then gives up root, becomes the owner of a
new user namespace, and forks the server as the first process of a new PID namespace.

Each member is the first process of a PID namespace of its own, so that its end is the end of all
that it started.  It stands in one of the server's places: a bind of the whole root with a small
tmpfs of its own on /tmp.  Places are made once and used again, because mounting and unmounting
waits for the kernel's grace periods; a place that was written to gets a new tmpfs.  Where Python
itself lives below /tmp, it is shown again on top of that tmpfs, and members start in a directory
beside it, so that their own is always empty.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NoReturn

from cosr_jax.verifiers.sandbox import linux

#: Where the server keeps the places, as seen from its root.
PLACES = "/places"
#: Empty directories that the root must have.
MOUNT_POINTS = (PLACES, "/tmp", "/proc")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
HOST_NAME = "sandbox"

_NOBODY = 65534
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_OLD = "/old"
_MAX_FILES = 4096


def build_root(visible: Sequence[str], proc: int) -> None:
    """Leaves the machine's mounts, network, IPC and host name for new ones.

    Args:
      visible: what to show, read-only, where it is now; a symbolic link is copied as such.
      proc: descriptor of the machine's /proc.

    Raises:
      OSError: the kernel, or what runs this process, does not allow it.
    """
    new = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    try:
        linux.unshare(new)
    except PermissionError:
        _own_user_namespace(new, proc)
    linux.mount("none", "/", "none", linux.MS_REC | linux.MS_PRIVATE)
    socket.sethostname(HOST_NAME)
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID, "mode=755,size=1m")
    os.mkdir("/tmp" + _OLD)
    os.chdir("/tmp")
    number = _PIVOT_ROOT[os.uname().machine]
    linux.syscall("pivot_root", number, b"/tmp", os.fsencode("/tmp" + _OLD))
    os.chdir("/")
    for directory in MOUNT_POINTS:
        os.mkdir(directory)
    for path in (*visible, *DEVICES):
        _show(path)
    linux.detach(_OLD)
    os.rmdir(_OLD)
    linux.make_read_only("/")


def _show(path: str) -> None:
    source = _OLD + path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.bind(source, path)


def _own_user_namespace(new: int, proc: int) -> None:
    """Enters a user namespace that knows this user and group only, and the namespaces ``new``."""
    uid, gid = os.geteuid(), os.getegid()
    linux.unshare(linux.CLONE_NEWUSER | new)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def give_up_root() -> None:
    """Becomes nobody, if this is root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def settle(proc: int, sock: socket.socket) -> int:
    """Returns in a new process: the first of its PID namespace, owner of all that it needs.

    The process that called stays behind, waits for the new one, and ends as it ended.

    Args:
      proc: descriptor of the machine's /proc.
      sock: what only the new process is to hold.

    Returns:
      The number on the machine of the process that stays behind.
    """
    guardian = int(os.readlink("self", dir_fd=proc))
    give_up_root()
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # else the maps of its namespace belong to root
    _own_user_namespace(linux.CLONE_NEWNS | linux.CLONE_NEWPID, proc)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", PLACES, "tmpfs", flags, "mode=700,size=1m")
    # Unbindable, so that a bind of the root does not take the other places along.
    linux.mount("none", PLACES, "none", linux.MS_UNBINDABLE)
    child = os.fork()
    if child:
        sock.close()
        _wait_for(child)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    return guardian


def _wait_for(child: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


class NamespaceIsolation:
    """Members in PID and user namespaces of their own, in places of the server's mounts.

    Args:
      proc: descriptor of the machine's /proc.
      visible: what the root shows.
    """

    may_change_attributes = True
    is_watched = False
    capabilities = 0
    max_tasks: int | None = 64

    def __init__(self, proc: int, visible: Sequence[str]):
        self._below_tmp = [path for path in visible if path.startswith("/tmp/")]
        self._untouched = _directories("/tmp", self._below_tmp)
        self._start = "/tmp"
        if self._below_tmp:
            name = "work"
            while name in self._untouched["/tmp"]:
                name += "_"
            self._start = f"/tmp/{name}"
            self._untouched["/tmp"].add(name)
            self._untouched[self._start] = set()
        self._pid_namespace = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        self._sizes: dict[int, int] = {}  # MiB of the tmpfs of each place
        self._has_unshared = False

    def prepare(self, place: int, file_mb: int) -> None:
        """In the server, before the fork: an empty place whose files may take ``file_mb`` MiB."""
        known = self._sizes.get(place)
        if known == file_mb:
            return
        root = f"{PLACES}/{place}"
        if known is None:
            os.mkdir(root)
            linux.bind("/", root)
            self._mount_private(place, file_mb)
        else:
            self._mount_private(place, file_mb, linux.MS_REMOUNT)

    def fork(self) -> int:
        """fork(2) of a process that is the first of a new PID namespace."""
        if self._has_unshared:
            linux.setns(self._pid_namespace, linux.CLONE_NEWPID)
        linux.unshare(linux.CLONE_NEWPID)
        self._has_unshared = True
        return os.fork()

    def enter(self, place: int) -> None:
        """In the member: into its place, without any power over it."""
        # The namespace counts the member's threads apart from its neighbours', and its
        # capabilities reach nothing outside; they go before the member runs.
        linux.unshare(linux.CLONE_NEWUSER)
        os.chroot(f"{PLACES}/{place}")
        os.chdir(self._start)

    def clean(self, place: int) -> None:
        """In the server, when the member is gone: nothing that it wrote stays."""
        root = f"{PLACES}/{place}"
        if all(
            set(os.listdir(root + directory)) == names
            and stat.S_IMODE(os.stat(root + directory).st_mode) == 0o700
            for directory, names in self._untouched.items()
        ):
            return
        linux.detach(f"{root}/tmp")
        self._mount_private(place, self._sizes[place])

    def is_over(self, place: int, file_mb: int) -> bool:
        """Never: the tmpfs keeps the limit itself."""
        return False

    def _mount_private(self, place: int, file_mb: int, how: int = 0) -> None:
        size_kb = max(file_mb * 1024, 4)  # to tmpfs, 0 would mean no limit
        options = f"mode=700,size={size_kb}k,nr_inodes={_MAX_FILES}"
        flags = linux.MS_NOSUID | linux.MS_NODEV | how
        root = f"{PLACES}/{place}"
        linux.mount("tmpfs", f"{root}/tmp", "tmpfs", flags, options)
        self._sizes[place] = file_mb
        if how == linux.MS_REMOUNT:
            return
        for directory, names in self._untouched.items():
            for name in sorted(names):
                os.mkdir(f"{root}{directory}/{name}", 0o700)
        for path in self._below_tmp:
            linux.bind(path, root + path)

    def close(self) -> None:
        """Nothing: the mounts go with their namespace."""


def _directories(top: str, paths: Sequence[str]) -> dict[str, set[str]]:
    """``top`` and the directories from there to each of ``paths``, with the names in them."""
    names: dict[str, set[str]] = {top: set()}
    for path in paths:
        step = PurePosixPath(path)
        while str(step) != top:
            names.setdefault(str(step.parent), set()).add(step.name)
            step = step.parent
    return dict(sorted(names.items()))  # parents first
