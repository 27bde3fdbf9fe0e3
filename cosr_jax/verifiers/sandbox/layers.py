"""The isolation layers: how each is started, what it promises, and which ones this machine has."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import cosr_jax
from cosr_jax.verifiers.sandbox.landlock import MINIMUM_ABI
from cosr_jax.verifiers.sandbox.namespaces import DEVICES, HOST_NAME, MOUNT_POINTS


@dataclasses.dataclass(frozen=True)
class Layer:
    """One way to isolate; the strongest comes first in ``LAYERS``."""

    name: str
    promise: str
    remedy: str  # how a machine gets it


LAYERS = (
    Layer(
        "bubblewrap",
        "own user, PID, mount, network, IPC and host name namespaces, set up by bubblewrap; "
        "system call filter; not a kernel exploit",
        "install bubblewrap (apt-get install bubblewrap) and allow user namespaces: "
        "kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, "
        "--security-opt seccomp=unconfined for Docker, or choose another layer",
    ),
    Layer(
        "namespaces",
        "own user, PID, mount, network, IPC and host name namespaces, set up by this package; "
        "system call filter; not a kernel exploit",
        "allow user namespaces: kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, "
        "--security-opt seccomp=unconfined for Docker; Linux 5.12 or newer; "
        "or choose another layer",
    ),
    Layer(
        "landlock",
        "Landlock and a system call filter, as nobody where the parent is root; names and sizes of "
        "the machine's files can be seen, processes share ids and user; not a kernel exploit",
        f"use Linux 6.2 or newer (Landlock ABI {MINIMUM_ABI}) with landlock among the kernel's "
        "lsm= list, or choose another layer",
    ),
)

#: What the interpreter and its libraries load beside the prefixes of Python.
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/etc/alternatives",
    "/etc/ld.so.cache",
)


def import_path() -> list[str]:
    """The server's ``sys.path``: the standard library, installed packages, and this one."""
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    found = [
        path
        for path in sys.path
        if Path(path).name in ("site-packages", "dist-packages")
        or any(Path(path).is_relative_to(prefix) for prefix in prefixes)
    ]
    found.append(str(_package().parent))
    return list(dict.fromkeys(str(Path(p).resolve()) for p in found if Path(p).is_dir()))


def visible_paths() -> list[str]:
    """What a sandbox shows of the machine's files: Python, its packages, system libraries."""
    prefixes = [sys.base_prefix, sys.base_exec_prefix]
    wanted = [*_SYSTEM, *prefixes, *import_path()[:-1], str(_package())]
    found: list[str] = []
    for path in dict.fromkeys(p if p in _SYSTEM else str(Path(p).resolve()) for p in wanted):
        is_below = any(Path(path).is_relative_to(other) for other in found)
        if Path(path).exists() and not is_below and path != "/":
            found.append(path)
    return found


def command(layer: str, python: Sequence[str], visible: Sequence[str]) -> list[str]:
    """The command line that runs ``python`` behind the outer part of ``layer``.

    Raises:
      FileNotFoundError: bubblewrap is not installed.
    """
    if layer != "bubblewrap":
        return list(python)
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap is not on the PATH")
    line = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    line += ["--hostname", HOST_NAME, "--as-pid-1"]
    if os.geteuid() == 0:
        # Root needs no user namespace to start with; the server gives these up (namespaces.settle).
        for capability in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"):
            line += ["--cap-add", capability]
    else:
        line += ["--unshare-user"]
    # Directories on the way are named, else bubblewrap makes them for its own user alone.
    for path in (*visible, *DEVICES):
        for parent in reversed(Path(path).parents[:-1]):
            line += ["--dir", str(parent)]
        if Path(path).is_symlink():
            line += ["--symlink", str(Path(path).readlink()), path]
        else:
            line += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    for directory in MOUNT_POINTS:
        line += ["--dir", directory]
    return [*line, "--remount-ro", "/", "--chdir", "/", "--", *python]


def _package() -> Path:
    return Path(cosr_jax.__file__).resolve().parent
