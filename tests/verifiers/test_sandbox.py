"""What a sandbox promises to the judge that drives it."""

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sandbox_fixtures import LAYERS, LIMITS, PROGRAM, descendants, open_box, servers, strongest

from cosr_jax.types import UserError
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox import layers, probe, process
from cosr_jax.verifiers.sandbox.host import Member, Sandbox, SandboxError


@pytest.fixture(scope="module", params=LAYERS)
def box(request):
    with open_box(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def any_box():
    with open_box(strongest()) as opened:
        yield opened


def test_a_program_gets_its_argument_and_its_descriptors(box):
    async def scenario():
        size = 3_000_000  # more than any socket holds
        code = "import os; os.write(fds[0], b'%d' % len(text))"
        async with box.started(f"text = '{'x' * size}'\n{code}") as (case, (ours,)):
            assert (await case.wait(0)).code == 0
            return await asyncio.get_running_loop().sock_recv(ours, 100)

    assert box.run(scenario()) == b"3000000"


@pytest.mark.parametrize(
    "code, exit_code, signal_number",
    [
        ("pass", 0, None),
        ("import os; os._exit(7)", 7, None),
        ("1 / 0", 1, None),
        ("import sys; sys.exit()", 1, None),
        ("import ctypes; ctypes.string_at(0)", None, signal.SIGSEGV),
    ],
)
def test_an_end_is_told_as_it_was(box, code, exit_code, signal_number):
    ended = box.execute(code).exit
    assert (ended.code, ended.signal, ended.limit) == (exit_code, signal_number, "")


def test_members_of_a_case_talk_to_each_other_only_by_what_they_were_given(box):
    ask = "import os; os.write(fds[1], b'2'); os.write(fds[0], os.read(fds[1], 9))"
    answer = "import os; os.write(fds[1], b'%d' % (int(os.read(fds[1], 9)) + 1))"

    async def scenario():
        async with box.started(ask, answer) as (case, (ours, _)):
            assert [(await case.wait(i)).code for i in (0, 1)] == [0, 0]
            return await asyncio.get_running_loop().sock_recv(ours, 9)

    assert box.run(scenario()) == b"3"


def test_kill_ends_a_busy_program_and_may_be_repeated(box):
    async def scenario():
        async with box.started("while True: pass", "import time; time.sleep(99)") as (case, _):
            waiting = [asyncio.ensure_future(case.wait(i)) for i in (0, 1, 1)]
            await asyncio.sleep(0.05)
            await case.kill()
            await case.kill()
            return [(await w).signal for w in waiting]

    assert box.run(scenario()) == [signal.SIGKILL] * 3


def test_the_end_of_one_member_leaves_the_other_running(box):
    async def scenario():
        async with box.started("pass", "import time; time.sleep(99)") as (case, _):
            assert (await case.wait(0)).code == 0
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(case.wait(1), 0.2)

    box.run(scenario())


def test_processor_time_is_limited_behind_the_wall_clock(any_box):
    # The limit lies above the wall clock by what all cores could use, and two seconds.
    ended = any_box.execute("while True: pass", Limits(wall_s=0.0)).exit
    assert (ended.signal, ended.limit) == (signal.SIGKILL, "cpu")
    assert 1.0 <= ended.cpu_s < 4.0


MIB = 1 << 20


@pytest.mark.parametrize(
    "code",
    [
        f"x = bytearray({200 * MIB})",
        f"x = []\nwhile True: x.append(b'x' * {MIB} + bytes(len(x)))",
        f"import numpy\nx = numpy.ones({200 * MIB} // 8)",
        f"import mmap\nx = mmap.mmap(-1, {400 * MIB})\nx[:] = b'x' * len(x)",
    ],
)
def test_memory_is_limited_and_its_want_is_told(box, code):
    ended = box.execute(code).exit
    assert ended.code != 0
    # mmap reports it as an OSError, which is the program's to tell.
    assert ended.out_of_memory or "mmap" in code


def test_memory_below_the_limit_is_there(box):
    assert (
        box.execute(f"x = bytearray({100 * MIB}); x[::4096] = b'x' * len(x[::4096])").exit.code == 0
    )


def test_threads_share_the_limit_of_memory(box):
    code = f"""
import threading
def take():
    held.append(bytearray({20 * MIB}))
held, threads = [], [threading.Thread(target=take) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert len(held) == 4
held.append(bytearray({60 * MIB}))
"""
    assert box.execute(code).exit.out_of_memory


def test_limits_beyond_any_machine_are_no_limits(any_box):
    limits = Limits(wall_s=float("inf"), memory_mb=10**15, file_mb=10**15)
    assert any_box.execute("open('x', 'w').write('x'); x = bytes(1 << 20)", limits).exit.code == 0


def test_the_hosts_own_limits_stand(any_box):
    """In a process of its own, whose limits cannot be raised again."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from sandbox_fixtures import open_box
with open_box({any_box.layer!r}) as box:
    ask = "import os, resource; os.write(fds[0], b'%d' % resource.getrlimit(7)[1])"
    print(box.execute(ask).said)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("200\n", "")


def test_files_are_limited_in_size_together(box):
    code = """
import os
written = 0
try:
    for i in range(9):
        with open(f"{i}", "wb") as file:
            written += file.write(bytes(1 << 20))
            file.flush()
finally:
    os.write(fds[0], f"{written >> 20} ".encode())
import time; time.sleep(60)
"""
    ended = box.execute(code)
    if box.layer == "landlock":  # no file system keeps the sum there; the server counts
        assert ended.exit.limit == "files"
    else:
        assert (ended.exit.code, ended.said) == (1, "2 OSError 28")  # ENOSPC


def test_one_file_is_limited_where_it_is_written(box):
    ended = box.execute("import os\nwith open('a', 'wb') as f: f.write(bytes(4 << 20))")
    assert ended.exit.code == 1
    assert ended.said in ("OSError 27", "OSError 28")  # EFBIG, ENOSPC


def test_many_small_files_are_limited_too(box):
    code = "import time\nfor i in range(9000): open(f'{i}', 'w').close()\ntime.sleep(60)"
    ended = box.execute(code)
    assert ended.exit.limit == "files" if box.layer == "landlock" else ended.said == "OSError 28"


def test_no_case_finds_anything_of_an_earlier_one(box):
    leave = """
import os
os.makedirs("a/b"); open("a/b/c", "w").write("x"); os.symlink("/", "root"); open(".hidden", "w")
"""
    look = "import os; os.write(fds[0], repr((os.listdir('.'), os.getcwd())).encode())"
    assert box.execute(leave).exit.code == 0
    said = box.execute(look).said
    assert said.startswith("([], '/")
    if box.layer != "landlock":
        assert said.startswith("([], '/tmp")


@pytest.mark.parametrize(
    "leave",
    [
        "for i in range(3000): os.mkdir('d' * 200); os.chdir('d' * 200)",
        "os.mkdir('closed'); open('closed/x', 'w'); os.mkdir('closed/a', 0); os.mkdir('b', 0)",
        "open(b'\\xff\\n', 'w'); os.symlink('/usr', 'usr'); os.symlink('loop', 'loop')",
        "os.mkdir('a'); open('a/b', 'w'); os.link('a/b', 'c')",
    ],
)
def test_no_tree_is_too_strange_to_be_removed(box, leave):
    for look in (leave, "os.write(fds[0], repr(os.listdir('.')).encode())"):
        ended = box.execute(f"import os\n{look}")
        assert ended.exit.limit in ("", "files")
    assert ended.said == "[]"


def test_a_smaller_limit_of_files_follows_a_larger_one(box):
    code = "f = open('a', 'wb', 0)\nfor _ in range(3): f.write(bytes(1 << 20))"
    assert box.execute(code, Limits(file_mb=4)).exit.code == 0
    assert box.execute(code, Limits(file_mb=1)).exit.code == 1
    assert box.execute("open('a', 'wb', 0).write(b'x')", Limits(file_mb=0)).exit.code == 1


def test_the_same_program_sees_the_same_hashes_and_random_numbers(box):
    code = "import os, random; os.write(fds[0], repr((hash('a'), random.random())).encode())"
    first = box.execute(code).said
    box.run(box.sandbox.start())  # another server
    assert [box.execute(code).said for _ in range(2)] == [first] * 2


def test_nothing_piles_up_over_many_cases(any_box):
    async def scenario():
        for _ in range(60):
            async with any_box.started("open('x', 'w').write('x')", "pass") as (case, _):
                await case.wait(0)

    any_box.run(scenario())
    before = _fds_of_this_process(), descendants(), _fds(any_box)
    any_box.run(scenario())
    assert (_fds_of_this_process(), descendants(), _fds(any_box)) == before


def _fds_of_this_process():
    return len(list(Path("/proc/self/fd").iterdir()))


def _fds(box):
    """What a member finds open: its own descriptors, whatever the server has."""
    code = """
import os
found = []
for fd in range(300):
    try: os.fstat(fd)
    except OSError: continue
    found.append(fd)
os.write(fds[0], repr([fd for fd in found if fd > 2 and fd not in fds]).encode())
"""
    said = box.execute(code).said
    assert said == "[]"
    return said


@pytest.mark.parametrize("which", ["outer", "inner"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_dead_server_is_told_at_once_and_can_be_started_again(layer, which):
    with open_box(layer) as box:

        async def scenario():
            async with box.started("import time; time.sleep(99)") as (case, _):
                waiting = asyncio.ensure_future(case.wait(0))
                await asyncio.sleep(0.05)
                everything = servers(box)
                server = box.sandbox._server
                if which == "outer":
                    server._process.kill()
                else:
                    signal.pidfd_send_signal(server._pidfds[-1], signal.SIGKILL)
                started = time.monotonic()
                with pytest.raises(SandboxError, match="died"):
                    await waiting
                assert time.monotonic() - started < 60.0
            assert not box.sandbox.is_alive
            with pytest.raises(SandboxError):
                await box.sandbox.spawn([])
            await _until_gone(everything)
            await box.sandbox.start()

        box.run(scenario())
        assert box.execute("pass").exit.code == 0


async def _until_gone(pids, wall_s=120.0):
    deadline = time.monotonic() + wall_s
    while left := [p for p in pids if _runs(p)]:
        assert time.monotonic() < deadline, f"{left} still run"
        await asyncio.sleep(0.01)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_member_that_is_killed_from_outside_is_no_failure_of_the_program(box):
    async def scenario():
        known = servers(box)
        async with box.started("import time; time.sleep(99)") as (case, _):
            while len(new := servers(box) - known) != 1:
                await asyncio.sleep(0.01)
            (pid,) = new
            os.kill(pid, signal.SIGKILL)
            # It may not have been ready yet.
            with pytest.raises(SandboxError, match=r"killed from outside|not isolated: it died"):
                await case.wait(0)

    box.run(scenario())
    assert box.execute("pass").exit.code == 0


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.kill(os.getpid(), 9)",
        "import signal, threading; signal.pthread_kill(threading.get_ident(), 9)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (0, 0))",
        "import os; os.kill(0, 0)",
        "import os; os.kill(-1, 0)",
    ],
)
def test_no_program_can_pass_for_one_that_was_killed(box, code):
    ended = box.execute(code)
    assert ended.exit.code == 1
    assert ended.said.split()[0] in ("PermissionError", "ValueError")  # as setrlimit tells it


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hung_server_is_given_up(layer, monkeypatch):
    monkeypatch.setattr(process, "_KILL_S", 0.3)
    with open_box(layer) as box:

        async def scenario():
            everything = set()
            with pytest.raises(SandboxError, match="did not end a case"):
                async with box.started("while True: pass"):
                    await asyncio.sleep(0.05)
                    everything |= servers(box)
                    for pid in everything:
                        os.kill(pid, signal.SIGSTOP)
            assert not box.sandbox.is_alive
            await _until_gone(everything)

        box.run(scenario())


@pytest.mark.parametrize("layer", LAYERS)
def test_close_leaves_nothing_behind(layer, monkeypatch):
    made = []
    mkdtemp = tempfile.mkdtemp

    def noted(*args, **kwargs):
        made.append(Path(mkdtemp(*args, **kwargs)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    before = descendants()
    with open_box(layer) as box:

        async def scenario():
            async with box.started("import time; time.sleep(99)") as (case, _):
                await asyncio.sleep(0.05)
                await box.sandbox.close()
                with pytest.raises(SandboxError, match="closed"):
                    await case.wait(0)
                assert descendants() == before
            with pytest.raises(SandboxError):
                await box.sandbox.spawn([])

        box.run(scenario())
    assert not any(path.exists() for path in made)


def test_a_server_that_cannot_import_says_why(any_box):
    async def scenario():
        await Sandbox(any_box.layer, ["no_such_module_here"]).start()

    with pytest.raises(SandboxError, match="no_such_module_here"):
        any_box.run(scenario())


def test_an_entry_that_is_not_there_is_the_sandboxes_trouble(any_box):
    async def scenario():
        case = await any_box.sandbox.spawn([Member("no_such_module:main", (), b"", LIMITS)])
        with pytest.raises(SandboxError, match="no_such_module"):
            await case.wait(0)
        await case.kill()

    any_box.run(scenario())
    assert any_box.execute("pass").exit.code == 0


def test_more_descriptors_than_a_message_carries_are_refused(any_box):
    async def scenario():
        with socket.socket() as sock:
            await any_box.sandbox.spawn([Member(PROGRAM, (sock.fileno(),) * 300, b"", LIMITS)])

    with pytest.raises(ValueError, match="at most 253"):
        any_box.run(scenario())


def test_many_cases_at_once_wait_for_a_busy_server(any_box):
    async def one(i):
        async with any_box.started(f"import os; os.write(fds[0], b'{i}')") as (case, (ours,)):
            await case.wait(0)
            return await asyncio.get_running_loop().sock_recv(ours, 9)

    async def scenario():
        return await asyncio.gather(*(one(i) for i in range(100)))

    assert any_box.run(scenario()) == [b"%d" % i for i in range(100)]


@pytest.fixture
def fresh_probe(monkeypatch):
    monkeypatch.setattr(probe, "_found", {})
    monkeypatch.setattr(probe, "_announced", set())


def test_auto_takes_the_strongest_layer_that_works_and_says_what_it_promises(
    fresh_probe, monkeypatch, caplog
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if asyncio.run(probe.probe("namespaces")):
        pytest.skip("no namespaces here")
    with caplog.at_level(logging.INFO):
        assert asyncio.run(probe.choose("auto")) == "namespaces"
    assert "bubblewrap does not work here: bwrap is not on the PATH" in caplog.text
    assert "not a kernel exploit" in caplog.text


def test_a_layer_that_is_missing_is_an_error_with_a_remedy(fresh_probe, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"'bubblewrap' does not work.*bwrap.*; install bubblewrap"):
        asyncio.run(Sandbox("bubblewrap").start())


def test_no_layer_at_all_is_an_error_too(monkeypatch):
    found = {layer: "the kernel said no" for layer in LAYERS}
    monkeypatch.setattr(probe, "_found", found)
    with pytest.raises(UserError, match=r"no isolation layer works.*landlock: the kernel said no"):
        asyncio.run(Sandbox("auto").start())


def test_a_layer_that_lets_a_program_out_is_not_taken(fresh_probe, monkeypatch, any_box):
    visible = [*layers.visible_paths(), "/etc/passwd"]
    monkeypatch.setattr(layers, "visible_paths", lambda: visible)
    assert asyncio.run(probe.probe(any_box.layer)) == "it lets a program read the accounts"
    with pytest.raises(UserError, match="read the accounts"):
        asyncio.run(Sandbox(any_box.layer).start())


def test_unknown_layers_are_named():
    with pytest.raises(UserError, match=r"'chroot' is no isolation layer; choose among auto, bubb"):
        Sandbox("chroot")
