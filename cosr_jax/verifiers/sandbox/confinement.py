# ruff: noqa: PTH102, PTH106, PTH110, PTH116
"""Isolation without namespaces: Landlock rules, a user without rights where root can give one.

Weaker than namespaces: a member sees that files exist that it may not open, and shares the user and
the process ids of its neighbours; Landlock and the system call filter keep it from touching them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cosr_jax.verifiers.sandbox import landlock, linux
from cosr_jax.verifiers.sandbox.namespaces import DEVICES, give_up_root

_NOBODY = 65534
_MIB = 1 << 20
_MAX_FILES = 4096
#: Of all that runs as nobody on this machine: a fence against floods of threads.
_MAX_TASKS_OF_NOBODY = 512


class LandlockIsolation:
    """Members under one Landlock ruleset for each place, a directory below ``base``.

    Args:
      visible: what may be read.
      base: a directory of the sandbox's own, on a tmpfs where the machine has one.
    """

    may_change_attributes = False
    is_watched = True
    capabilities = 0
    max_tasks: int | None = None

    def __init__(self, visible: Sequence[str], base: str):
        self._readable = [p for p in visible if os.path.exists(p)]
        self._base = base
        self._rulesets: dict[int, landlock.Ruleset] = {}

    def give_up_root(self) -> None:
        """Becomes nobody, if this is root.

        An interpreter in root's own home is out of reach for nobody.  Then one capability stays,
        to read whatever the modes of files say; Landlock still says which files.
        """
        if os.geteuid() == 0:
            os.chown(self._base, _NOBODY, _NOBODY)
            if not _nobody_can_read(self._readable):
                self.capabilities = linux.CAP_DAC_READ_SEARCH
                linux.prctl(linux.PR_SET_KEEPCAPS, 1)
            give_up_root()
            self.max_tasks = _MAX_TASKS_OF_NOBODY
        linux.keep_capabilities(self.capabilities)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)

    def prepare(self, place: int, file_mb: int) -> None:
        """In the server, before the fork: an empty place, and room for ``file_mb`` MiB.

        Raises:
          OSError: the file system is full.
        """
        private = f"{self._base}/{place}"
        if place not in self._rulesets:
            os.mkdir(private, 0o700)
            self._rulesets[place] = landlock.Ruleset(self._readable, DEVICES, private)
        room = os.statvfs(private)
        if room.f_bavail * room.f_frsize < file_mb * _MIB:
            raise OSError(f"less than {file_mb} MiB are free for the sandbox's files")

    def fork(self) -> int:
        """fork(2)."""
        return os.fork()

    def enter(self, place: int) -> None:
        """In the member: into its place, out of reach of everything else."""
        os.chdir(f"{self._base}/{place}")
        self._rulesets[place].put_on()

    def clean(self, place: int) -> None:
        """In the server, when the member is gone: nothing that it wrote stays."""
        fd = os.open(f"{self._base}/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _empty(fd)
        finally:
            os.close(fd)

    def is_over(self, place: int, file_mb: int) -> bool:
        """Whether the member's files take more than they may, as far as can be seen."""
        size = count = 0
        left = [f"{self._base}/{place}"]
        while left:
            try:
                with os.scandir(left.pop()) as entries:
                    for entry in entries:
                        count += 1
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if size > file_mb * _MIB or count > _MAX_FILES:
                            return True
                        if entry.is_dir(follow_symlinks=False):
                            left.append(entry.path)
            except FileNotFoundError:
                continue  # the member removes files while they are counted
            except OSError:
                return True  # too deep or closed to us: nothing that an honest program makes
        return False

    def close(self) -> None:
        """Removes every place and the directory around them."""
        for place in self._rulesets:
            self.clean(place)
            os.rmdir(f"{self._base}/{place}")
        os.rmdir(self._base)


def _empty(top: int) -> None:
    """Removes all below the open directory ``top``, however deep it goes and whatever its modes.

    A subdirectory's entries are moved up before it goes, so that no path grows long.
    """
    token = os.urandom(8).hex()  # names that no program can have taken
    number = 0
    while names := _entries(top):
        for name, is_directory in names:
            if not is_directory:
                os.unlink(name, dir_fd=top)
                continue
            os.chmod(name, 0o700, dir_fd=top)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
            for below, is_directory_too in _entries(fd):
                if is_directory_too:
                    os.chmod(below, 0o700, dir_fd=fd)
                number += 1
                os.rename(below, f"{token}{number}", src_dir_fd=fd, dst_dir_fd=top)
            os.close(fd)
            os.rmdir(name, dir_fd=top)


def _entries(fd: int) -> list[tuple[str, bool]]:
    with os.scandir(fd) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _nobody_can_read(paths: Sequence[str]) -> bool:
    os.seteuid(_NOBODY)
    try:
        for path in paths:
            os.stat(path)
        return True
    except PermissionError:
        return False
    finally:
        os.seteuid(0)
