"""What no program can do in a sandbox, and what honest programs still can, in every layer.

The hostile programs here would do no harm if a layer failed: they write only to what these tests
made (a file, a listener on loopback, the other member of the case), and else only look.
"""

import asyncio
import json
import os
import platform
import socket
import tempfile
from pathlib import Path

import pytest
from sandbox_fixtures import LAYERS, LIMITS, open_box, servers

from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import layers

#: Numbers of calls that Python does not offer: (x86-64, AArch64), from Linux's uapi headers.
CALLS = {
    "bpf": (321, 280),
    "execveat": (322, 281),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "mount": (165, 40),
    "msgget": (68, 186),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "recvmsg": (47, 212),
    "rt_sigqueueinfo": (129, 138),
    "seccomp": (317, 277),
    "semget": (64, 190),
    "sendmsg": (46, 211),
    "setns": (308, 268),
    "shmget": (29, 194),
    "timer_create": (222, 107),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
ARCHITECTURES = ("x86_64", "aarch64")


@pytest.fixture(scope="module", params=LAYERS)
def box(request):
    with open_box(request.param) as opened:
        yield opened


def attempt(box, expression):
    """What evaluating ``expression`` in a sandbox gives: its repr, or the exception's name."""
    code = f"""
import os, socket, sys
try:
    said = repr({expression})
except BaseException as error:
    said = type(error).__name__
os.write(fds[0], said.encode())
"""
    ended = box.execute(code)
    assert ended.exit.code == 0
    return ended.said


@pytest.mark.skipif(platform.machine() not in ARCHITECTURES, reason="its calls are not known")
def test_dangerous_system_calls_are_refused(box):
    column = ARCHITECTURES.index(platform.machine())
    numbers = {name: both[column] for name, both in CALLS.items()}
    code = f"""
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
said = dict()
for name, number in {numbers}.items():
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    said[name] = errno.errorcode[ctypes.get_errno()] if result < 0 else result
os.write(fds[0], json.dumps(said).encode())
"""
    assert json.loads(box.execute(code).said) == dict.fromkeys(CALLS, "EPERM")


@pytest.mark.parametrize(
    "expression",
    [
        "os.fork()",
        "os.vfork() if hasattr(os, 'vfork') else os.fork()",
        "os.posix_spawn('/bin/true', ['true'], dict())",
        "os.execv('/bin/true', ['true'])",
        "__import__('subprocess').run(['true'])",
        "__import__('multiprocessing').get_context('fork').Process(target=print).start()",
        "os.system('true') and 1 / 0",
        "socket.socket()",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_INET6)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(40, socket.SOCK_STREAM)",  # AF_VSOCK
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "os.memfd_create('x')",
        "os.mkfifo('x')",
        "os.setsid()",
        "os.nice(-1)",
        "os.chroot('.')",
        "os.setuid(0) or 1 / 0 if os.getuid() else os.setgroups([1])",
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.open('/etc/shadow', os.O_RDONLY)",
        "os.open('/proc/self/environ', os.O_RDONLY)",
        "os.open('/proc/1/environ', os.O_RDONLY)",
        "os.open('/proc/self/mem', os.O_RDWR)",
        "os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)",
        "os.open('/sys/kernel/uevent_helper', os.O_RDONLY)",
        "os.listdir('/dev/shm')",
        "os.open('/dev/tty', os.O_RDWR)",
        "os.listdir('/home')",
        "os.listdir('/var')",
        "os.open(os.__file__, os.O_WRONLY)",
        "os.setxattr('.', 'user.x', b'')",
    ],
)
def test_the_machine_is_out_of_reach(box, expression):
    errors = ("PermissionError", "FileNotFoundError", "OSError", "ZeroDivisionError")
    assert attempt(box, expression) in errors


def test_the_sandbox_shows_only_what_python_needs(box):
    root = attempt(box, "os.listdir('/')")
    if box.layer == "landlock":
        assert root == "PermissionError"
    else:
        assert not set(json.loads(root.replace("'", '"'))) & {"home", "var", "boot", "srv", "mnt"}
    tests = str(Path(__file__).parent)
    assert attempt(box, f"os.listdir({tests!r})") in (
        "FileNotFoundError",
        "PermissionError",
    )


def test_nobody_runs_as_root(box):
    has_own_users = box.layer != "landlock" or os.getuid() == 0
    assert int(attempt(box, "os.getuid()")) == (65534 if has_own_users else os.getuid())
    assert attempt(box, "os.setuid(0)") == "PermissionError"


def test_a_file_of_the_machine_is_neither_read_nor_written(box, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    canary.chmod(0o666)
    tmp_path.chmod(0o777)
    for mode in ("r", "w", "a", "r+"):
        assert attempt(box, f"open({str(canary)!r}, {mode!r})").endswith("Error")
    for call in ("unlink", "remove", "listdir", "chdir"):
        path = canary if call in ("unlink", "remove") else tmp_path
        assert attempt(box, f"os.{call}({str(path)!r})").endswith("Error") or call == "chdir"
    assert attempt(box, f"os.symlink({str(canary)!r}, 'x') or open('x').read()").endswith("Error")
    assert canary.read_text() == "untouched"


@pytest.fixture
def shown():
    """A directory that everybody may write to; not below /tmp, which is the members' own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        Path(path).chmod(0o777)
        yield Path(path)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_visible_cannot_be_changed(layer, monkeypatch, shown):
    visible = [*layers.visible_paths(), str(shown)]
    monkeypatch.setattr(layers, "visible_paths", lambda: visible)
    canary = shown / "canary"
    canary.write_text("untouched")
    canary.chmod(0o666)
    before = canary.stat()
    with open_box(layer) as box:
        name, beside = repr(str(canary)), repr(str(shown / "new"))
        assert attempt(box, f"open({name}).read()") == "'untouched'"
        for attack in (
            f"open({name}, 'w')",
            f"os.open({name}, os.O_RDONLY | os.O_TRUNC)",
            f"os.truncate({name}, 0)",
            f"os.unlink({name})",
            f"os.rename({name}, 'x')",
            f"os.rename({name}, {beside})",
            f"os.link({name}, 'x')",
            f"os.link({name}, {beside})",
            f"os.symlink('x', {beside})",
            f"os.mkdir({beside})",
            f"open({beside}, 'w')",
            f"os.chmod({name}, 0o600)",
            f"os.chown({name}, 1, 1)",
            f"os.utime({name})",
            f"os.setxattr({name}, 'user.x', b'')",
        ):
            assert attempt(box, attack) in ("PermissionError", "OSError"), attack
    assert [p.name for p in shown.iterdir()] == ["canary"]
    assert canary.read_text() == "untouched"
    after = canary.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_uid) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_uid,
    )


def test_nobody_calls_home(box):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = listener.getsockname()
        assert attempt(box, f"socket.create_connection({address})") == "PermissionError"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("layer", LAYERS)
def test_the_environment_holds_nothing_of_the_hosts(layer, monkeypatch):
    monkeypatch.setenv("CANARY_SECRET", "s3cret-value")
    with open_box(layer) as box:
        assert attempt(box, "dict(os.environ)") == "{}"
        assert attempt(box, "sys.argv") == "['']"
        for pid in servers(box):  # what their memory held when they were started
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except PermissionError:
                continue  # not even the user who started it may look
            names = {part.partition(b"=")[0] for part in environment.split(b"\0") if part}
            assert names <= {b"PYTHONHASHSEED", b"LD_BIND_NOW", b"LC_CTYPE", b"PWD"}


def test_a_member_cannot_touch_the_other_one(box):
    """The victim tells its number; the attacker tries all that Python and libc offer."""
    victim = """
import os
os.write(fds[1], b"%d" % os.getpid())
os.read(fds[1], 9)
os.write(fds[0], b"unharmed")
"""
    attacker = """
import json, os, resource
pid, own = int(os.read(fds[1], 9)), os.getpid()
said = dict(own=own, victim=pid, parent=os.getppid())
others = [-1, 0, *range(2, 4000)] if own == 1 else [pid, os.getppid()]
def reach(what, act):
    for p in others:
        try:
            act(p)
        except (OSError, ValueError):
            continue
        said.setdefault(what, []).append(p)
reach("kill", lambda p: os.kill(p, 0))
cpus = os.sched_getaffinity(0)
others = [p for p in others if p > 0]
reach("limit", lambda p: resource.prlimit(p, resource.RLIMIT_CPU))
reach("affinity", lambda p: os.sched_setaffinity(p, cpus))
reach("priority", lambda p: os.setpriority(os.PRIO_PROCESS, p, 0))
os.write(fds[1], b"go")
os.write(fds[0], json.dumps(said).encode())
"""

    async def scenario():
        loop = asyncio.get_running_loop()
        async with box.started(victim, attacker) as (case, (from_victim, from_attacker)):
            said = json.loads(await loop.sock_recv(from_attacker, 1 << 16))
            assert await loop.sock_recv(from_victim, 100) == b"unharmed"
            assert [(await case.wait(i)).code for i in (0, 1)] == [0, 0]
            return said

    said = box.run(scenario())
    numbers = {name: said.pop(name) for name in ("own", "victim", "parent")}
    assert said == {}
    if box.layer != "landlock":
        assert numbers == {"own": 1, "victim": 1, "parent": 0}


def test_a_flood_of_threads_ends_with_its_case(box):
    code = """
import threading, time
threading.stack_size(1 << 16)
made = 0
try:
    while made < 20000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
import os
os.write(fds[0], b"%d" % made)
"""
    made = int(box.execute(code, Limits(memory_mb=64)).said)
    assert 8 <= made <= 2000
    if box.layer != "landlock":
        assert made < 64
    assert box.execute("import threading\nthreading.Thread(target=print).start()").exit.code == 0


def test_a_case_that_leaves_threads_and_descriptors_is_over_when_it_ends(box):
    code = """
import os, threading, time
for _ in range(5): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
os._exit(0)
"""
    assert box.execute(code).exit.code == 0


HONEST = {
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: assert sum(pool.map(lambda x: x * x, range(10))) == 285
""",
    "asyncio": """
import asyncio
async def work(): await asyncio.sleep(0.001); return 3
async def main(): return await asyncio.gather(work(), work())
assert asyncio.run(main()) == [3, 3]
""",
    "numpy": """
import numpy as np
a = np.arange(250000.0).reshape(500, 500)
assert np.allclose(np.linalg.solve(a @ a.T + np.eye(500) * 1e9, a[0]).shape, (500,))
assert np.random.default_rng(0).random() < 1
""",
    "files": """
import json, os, pathlib, tempfile
pathlib.Path("a/b").mkdir(parents=True)
pathlib.Path("a/b/c.json").write_text(json.dumps([1]))
os.rename("a/b/c.json", "d"); assert json.loads(open("d").read()) == [1]
with tempfile.TemporaryFile() as f: f.write(b"x")
with tempfile.NamedTemporaryFile("w") as f: f.write("x")
with tempfile.TemporaryDirectory() as d: open(os.path.join(d, "x"), "w").close()
""",
    "signals": """
import signal, time
def late(*_): raise TimeoutError
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    time.sleep(5)
    raise AssertionError
except TimeoutError:
    pass
""",
    "libraries": """
import collections, ctypes, datetime, decimal, fractions, hashlib, heapq, itertools, random
import re, sqlite3, statistics, string, struct, uuid, zlib
assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
assert len(uuid.uuid4().hex) == 32 and hashlib.sha256(b"").hexdigest().startswith("e3b0")
""",
    "recursion": """
import resource, sys, threading
sys.setrecursionlimit(10**6)
resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))
resource.getrlimit(resource.RLIMIT_CPU)
threading.stack_size(64 << 20)
def depth(n): return n and depth(n - 1) + 1
thread = threading.Thread(target=lambda: found.append(depth(50000)))
found = []; thread.start(); thread.join()
assert found == [50000]
""",
    "devices": """
for name, size in (("null", 0), ("zero", 3), ("full", 3), ("random", 3), ("urandom", 3)):
    assert len(open(f"/dev/{name}", "rb", 0).read(3)) == size
open("/dev/null", "w").write("x")
""",
    "exit is a builtin": """
try: exit(3)
except SystemExit as end: assert end.code == 3
""",
    "text is UTF-8": """
open("x", "w").write("\\u00e4\\u20ac"); assert open("x", "rb").read() == "\\u00e4\\u20ac".encode()
""",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_find_what_they_need(box, name):
    ended = box.execute(HONEST[name], LIMITS)
    assert (ended.said, ended.exit.code) == ("", 0)


@pytest.mark.parametrize("layer", LAYERS)
def test_packages_below_tmp_are_there_and_stay_as_they_are(layer, monkeypatch):
    write = "import os; open(os.path.dirname(os.path.dirname(packed.__file__)) + '/x', 'w')"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        packages = Path(folder, "venv", "site-packages")
        packages.mkdir(parents=True)
        Path(folder).chmod(0o755)
        (packages / "packed.py").write_text("value = 7")
        monkeypatch.syspath_prepend(packages)
        with open_box(layer) as box:
            for _ in range(2):
                ended = box.execute("import packed; assert packed.value == 7; open('x', 'w')")
                assert (ended.said, ended.exit.code) == ("", 0)
                # What lies around the packages is each member's own at most.
                box.execute(f"import packed; {write}")
                found = box.execute(
                    f"import os; assert not os.path.exists({str(packages.parent / 'x')!r}); "
                    f"assert not os.access({str(packages)!r}, os.W_OK)"
                )
                assert (found.said, found.exit.code) == ("", 0)
        assert [path.name for path in packages.parent.iterdir()] == ["site-packages"]
