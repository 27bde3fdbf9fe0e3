"""Steps come back bit for bit or not at all, whatever happened to the process or the disk."""

import contextlib
import errno
import logging
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from cosr_jax.run import checkpoint, manifest
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.types import UserError


def make_mesh(fsdp, tensor):
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def small(step):
    return {"w": jnp.full((4, 2), step, jnp.float32), "count": jnp.int32(step)}


def fill(directory, steps, keep=10, best=()):
    with CheckpointStore(directory, keep) as store:
        for step in steps:
            store.save(step, small(step), {"step": step}, is_best=step in best)


def step_names(directory):
    return sorted(p.name for p in directory.iterdir())


def raw(array):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), None])
def test_every_bit_returns_on_any_number_of_devices(tmp_path, shape):
    bits = np.random.default_rng(0).integers(0, 2**32, (16, 8), np.uint32)
    bits[0, :4] = [0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001]  # NaNs with payload, -0, tiny
    key = jax.random.fold_in(jax.random.key(5), 7)
    values = {
        "float32": jnp.asarray(bits.view(np.float32)),
        "bfloat16": jax.lax.bitcast_convert_type(
            jnp.asarray(bits & 0xFFFF, jnp.uint16), "bfloat16"
        ),
        "int32": jnp.asarray(bits.view(np.int32)),
        "uint32": jnp.asarray(bits),
    }
    here = NamedSharding(make_mesh(4, 2), jax.P("fsdp", "tensor"))
    arrays = {
        "matrices": [jax.device_put(values[name], here) for name in sorted(values)],
        "raw_key": jax.random.PRNGKey(3),
        "typed_key": jax.device_put(key, NamedSharding(make_mesh(4, 2), jax.P())),
        "keys": jax.device_put(
            jax.random.split(key, 8), NamedSharding(make_mesh(4, 2), jax.P("fsdp"))
        ),
    }
    host = {"curator": {"n": [1, 2**70, None]}, "loss": [0.1 + 0.2, 5e-324, -0.0], "text": "é☃\n"}
    with CheckpointStore(tmp_path, 1) as store:
        store.save(3, arrays, host)

    one = SingleDeviceSharding(jax.devices()[0])
    there = NamedSharding(make_mesh(*shape), jax.P("fsdp", "tensor")) if shape else one
    keys = NamedSharding(make_mesh(*shape), jax.P("tensor")) if shape else one
    template = {
        "matrices": [
            jax.ShapeDtypeStruct((16, 8), leaf.dtype, sharding=there) for leaf in arrays["matrices"]
        ],
        "raw_key": jax.ShapeDtypeStruct((2,), jnp.uint32),
        "typed_key": jax.ShapeDtypeStruct((), key.dtype, sharding=one),
        "keys": jax.ShapeDtypeStruct((8,), key.dtype, sharding=keys),
    }
    with CheckpointStore(tmp_path, 1) as store:
        restored = store.restore(template)
    assert restored.step == 3
    assert restored.host_state == host and str(restored.host_state) == str(host)
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(arrays)
    for got, saved, asked in zip(
        *map(jax.tree.leaves, (restored.arrays, arrays, template)), strict=True
    ):
        assert got.dtype == saved.dtype and raw(got) == raw(saved)
        assert got.sharding == (asked.sharding or one)
    assert jax.random.uniform(restored.arrays["typed_key"]) == jax.random.uniform(key)


def test_an_array_template_keeps_its_scalars_free_to_meet_a_mesh(tmp_path):
    sharded = NamedSharding(make_mesh(4, 2), jax.P("fsdp"))
    arrays = {
        "w": jax.device_put(jnp.arange(8.0), sharded),
        "n": jnp.int32(3),
        "k": jax.random.key(1),
    }
    with CheckpointStore(tmp_path, 1) as store:
        store.save(0, arrays, {})
        restored = store.restore(arrays).arrays
    assert raw(restored["k"]) == raw(arrays["k"])
    assert restored["w"].sharding == sharded and not restored["n"].committed
    total = jax.jit(lambda t: (t["w"] * t["n"]).sum() + jax.random.uniform(t["k"]))(restored)
    assert total == jax.jit(lambda t: (t["w"] * t["n"]).sum() + jax.random.uniform(t["k"]))(arrays)


def test_arrays_and_host_state_may_change_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    host = {"history": [1]}
    with CheckpointStore(tmp_path, 1) as store:
        x = jnp.arange(500_000.0)
        store.save(1, {"x": x}, host)
        host["history"].append(2)
        x = jax.block_until_ready(advance(x))
        restored = store.restore({"x": x})
    assert restored.host_state == {"history": [1]}
    np.testing.assert_array_equal(restored.arrays["x"], np.arange(500_000.0, dtype=np.float32))


def test_rotation_keeps_the_latest_and_the_best(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.latest_step() is None and store.best_step() is None
        for step in range(1, 9):
            store.save(step, small(step), {}, is_best=step in (1, 5))
            store.wait()
            best = 5 if step >= 5 else 1
            assert {int(name) for name in step_names(tmp_path)} == {best, max(step - 1, 1), step}
            assert (store.latest_step(), store.best_step()) == (step, best)
        assert store.restore(small(0), step=5).arrays["count"] == 5


def damages(size):
    yield "missing", lambda p: p.unlink()
    if size:
        yield "instead of", lambda p: p.write_bytes(p.read_bytes()[:-1])
        yield (
            "other content",
            lambda p: p.write_bytes(
                (b := p.read_bytes())[: len(b) // 2]
                + bytes([b[len(b) // 2] ^ 1])
                + b[len(b) // 2 + 1 :]
            ),
        )
    else:
        yield "instead of", lambda p: p.write_bytes(b"x")


def test_damage_to_any_file_is_named_and_the_step_before_is_used(tmp_path, caplog):
    fill(tmp_path / "sound", [4, 8])
    names = [
        p.relative_to(tmp_path / "sound")
        for p in (tmp_path / "sound" / "00000008").rglob("*")
        if p.is_file()
    ]
    assert len(names) > 8
    for i, name in enumerate(names):
        for j, (words, damage) in enumerate(damages((tmp_path / "sound" / name).stat().st_size)):
            copy = tmp_path / f"{i}-{j}"
            shutil.copytree(tmp_path / "sound", copy)
            damage(copy / name)
            caplog.clear()
            with CheckpointStore(copy, 10) as store:
                restored = store.restore(small(0))
            assert (restored.step, restored.host_state) == (4, {"step": 4})
            assert restored.arrays["count"] == 4
            [message] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            relative = name.relative_to("00000008").as_posix()
            assert f"skipping checkpoint {copy / '00000008'}: {relative} " in message
            assert words in message or relative == manifest.NAME
            shutil.rmtree(copy)


def test_a_run_goes_on_over_a_damaged_step(tmp_path):
    fill(tmp_path, [4, 8])
    (tmp_path / "00000008" / "host" / "data.json").unlink()
    with CheckpointStore(tmp_path, 10) as store:
        assert store.latest_step() == 8  # not looked into yet
        assert store.restore(small(0)).step == 4
        assert store.latest_step() == 4
        store.save(6, small(6), {"step": 6})
        store.save(8, small(80), {"step": 80})
    with CheckpointStore(tmp_path, 10) as store:
        assert store.restore(small(0)).host_state == {"step": 80}
    assert step_names(tmp_path) == ["00000004", "00000006", "00000008"]


def test_all_damaged_stops_instead_of_starting_afresh(tmp_path):
    fill(tmp_path, [4, 8])
    for folder in tmp_path.iterdir():
        (folder / manifest.NAME).write_bytes(b"")
    with CheckpointStore(tmp_path, 10) as store:
        assert store.latest_step() == 8
        assert store.best_step() is None
        with pytest.raises(
            UserError, match=r"none of the checkpoints .*\(steps \[4, 8\].*manifest"
        ):
            store.restore(small(0))


def test_a_named_step_is_read_or_refused_never_replaced(tmp_path):
    fill(tmp_path, [4, 8])
    (tmp_path / "00000004" / "host" / "data.json").write_text("{}")
    with CheckpointStore(tmp_path, 10) as store:
        with pytest.raises(UserError, match=r"00000004 is damaged: host/data.json has 2 bytes"):
            store.restore(small(0), step=4)
        with pytest.raises(UserError, match=r"no checkpoint of step 5; choose one of \[4, 8\]"):
            store.restore(small(0), step=5)
    with CheckpointStore(tmp_path / "none", 1) as store, pytest.raises(UserError, match="no check"):
        store.restore(small(0))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            {"w": jnp.zeros((4, 3)), "count": jnp.int32(0)},
            r"w is float32\[4,2\] there and float32\[4,3\]",
        ),
        ({"w": jnp.zeros((4, 2), jnp.bfloat16), "count": jnp.int32(0)}, r"bfloat16\[4,2\] here"),
        ({"w": jnp.zeros((4, 2))}, r"count is int32\[\] there and absent here"),
        ({**small(0), "more": {"v": jnp.zeros(3)}}, r"more/v is absent there"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path, template, words):
    fill(tmp_path, [1])
    with CheckpointStore(tmp_path, 1) as store, pytest.raises(UserError, match=words):
        store.restore(template)


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        CheckpointStore(tmp_path, 0)
    with CheckpointStore(tmp_path, 1) as store:
        store.save(3, small(3), {})
        with pytest.raises(ValueError, match="step 3 is not after"):
            store.save(3, small(3), {})
        with pytest.raises(TypeError, match="a/b is a int"):
            store.save(4, {"a": {"b": 1}}, {})
        with pytest.raises(TypeError, match="JSON"):
            store.save(4, small(4), {"a": object()})
        with pytest.raises(ValueError, match="no leaves"):
            store.save(4, {}, {})


def test_leftovers_of_a_kill_are_ignored_and_removed_by_the_next_save(tmp_path):
    fill(tmp_path, [4, 8, 12])
    (tmp_path / "notes.txt").write_text("not ours")
    # Killed between rename and seal, while sealing, and while Orbax was writing.
    (tmp_path / "00000012" / manifest.NAME).rename(tmp_path / "00000012" / ".manifest.json.tmp")
    shutil.copytree(tmp_path / "00000008", tmp_path / "00000016.orbax-checkpoint-tmp")
    with CheckpointStore(tmp_path, 10) as store:
        assert store.latest_step() == 8
        assert store.restore(small(0)).step == 8
        assert (tmp_path / "00000012").exists()  # a reader changes nothing
        store.save(10, small(10), {})
    assert step_names(tmp_path) == ["00000004", "00000008", "00000010", "notes.txt"]


def test_a_step_left_unfinished_is_saved_anew_under_its_number(tmp_path):
    fill(tmp_path, [1, 2])
    (tmp_path / "00000002" / manifest.NAME).unlink()
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.restore(small(0)).step == 1
        store.save(2, small(20), {})
    assert step_names(tmp_path) == ["00000002"]
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.restore(small(0)).arrays["count"] == 20


def test_an_old_step_outlives_every_moment_before_the_new_seal(tmp_path, monkeypatch):
    fill(tmp_path, [1], keep=1)

    def refuse(folder, facts):
        assert {"00000001", "00000002"} <= set(step_names(tmp_path))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "write", refuse)
    with CheckpointStore(tmp_path, 1) as store:
        store.save(2, small(2), {})
        with pytest.raises(UserError, match=r"step 2 .*No space left.*latest saved step is 1"):
            store.wait()
        assert step_names(tmp_path) == ["00000001"]
        monkeypatch.undo()
        store.save(2, small(2), {})
    assert step_names(tmp_path) == ["00000002"]


def test_an_error_that_is_not_the_disks_passes_unchanged(tmp_path, monkeypatch):
    def fail(folder, facts):
        raise ZeroDivisionError

    monkeypatch.setattr(manifest, "write", fail)
    with CheckpointStore(tmp_path, 1) as store:
        store.save(2, small(2), {})
        with pytest.raises(ZeroDivisionError):
            store.save(3, small(3), {})


@contextlib.contextmanager
def tiny_disk(folder):
    """A 1 MiB file system where root allows, else a limit of 256 KiB on every file."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_error_and_the_old_steps_stay(tmp_path):
    with tiny_disk(tmp_path / "disk"):
        store = CheckpointStore(tmp_path / "disk", 2)
        store.save(1, small(1), {"step": 1}, is_best=True)
        incompressible = {"x": jax.random.bits(jax.random.key(0), (1_000_000,))}
        store.save(2, incompressible, {})
        with pytest.raises(UserError, match=r"step 2 .*(No space left|File too large).*step is 1"):
            store.wait()
        assert step_names(tmp_path / "disk") == ["00000001"]
        store.save(3, small(3), {"step": 3})  # room again: the failed attempt left nothing
        assert store.restore(small(0)).host_state == {"step": 3}
        store.close()


def test_a_folder_that_cannot_be_made_or_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, words in [
        (tmp_path / "file" / "checkpoints", "Not a directory"),
        (Path("/proc/checkpoints"), "No such file or directory"),
    ]:
        with (
            CheckpointStore(folder, 1) as store,
            pytest.raises(UserError, match=f"could not be written to {folder}: {words}"),
        ):
            store.save(1, small(1), {})


def test_a_read_only_disk_is_one_clear_error_and_the_old_steps_stay(tmp_path):
    folder = tmp_path / "disk"
    with tiny_disk(folder):
        fill(folder, [1])
        is_mount = folder.is_mount()
        if is_mount:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder.chmod(0o500)
        with CheckpointStore(folder, 1) as store:
            with pytest.raises(UserError, match=r"Read-only file system|Permission denied"):
                store.save(2, small(2), {})
                store.wait()
            assert store.restore(small(0)).step == 1
        if not is_mount:
            folder.chmod(0o700)


def test_orbax_is_quiet(tmp_path):
    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    absl = logging.getLogger("absl")
    level = absl.level
    absl.addHandler(handler)
    absl.setLevel(logging.INFO)
    try:
        fill(tmp_path, [1, 2])
        with CheckpointStore(tmp_path, 1) as store:
            store.restore(small(0))
        absl.info("others still speak")
    finally:
        absl.removeHandler(handler)
        absl.setLevel(level)
    assert shown == ["others still speak"]


# One process imports everything and forks a run for every kill: imports are most of a run's time.
_KILLED_RUNS = textwrap.dedent("""
    import os, random, signal, sys, time, traceback
    import jax, jax.numpy as jnp, numpy as np
    from cosr_jax.run.checkpoint import CheckpointStore

    directory, kills = sys.argv[1], int(sys.argv[2])

    def state(step):
        return {f"layer{i}": jnp.full((64, 16), step * 100 + i, jnp.float32) for i in range(60)}

    def run(report):
        with CheckpointStore(directory, keep=1) as store:
            start = 0
            if store.latest_step() is not None:
                restored = store.restore(state(0))
                start = restored.step
                assert restored.host_state == {"step": start}
                for name, array in state(start).items():
                    np.testing.assert_array_equal(restored.arrays[name], array)
            os.write(report, b"%d\\n" % start)
            for step in range(start + 1, start + 1000):
                store.save(step, state(step), {"step": step})
                store.wait()
                os.write(report, b"%d\\n" % step)

    rng, reached = random.Random(0), 0
    for _ in range(kills + 1):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                run(write)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(write)
        with open(read) as reports:
            try:
                line = reports.readline()
                assert line, "the run died before it was killed"
                start = int(line)
                assert start >= reached, f"resumed at {start} after {reached} had been saved"
                reached = start
                for _ in range(rng.randint(0, 2)):
                    reached = int(reports.readline())
                time.sleep(rng.uniform(0.0, 0.2))
            finally:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            reached = max([reached, *(int(line) for line in reports)])
        assert status == signal.SIGKILL
    print(reached)
""")


def test_kills_at_random_moments_never_lose_a_saved_step(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KILLED_RUNS, str(tmp_path), "6"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2


def test_what_cannot_be_two_leaves_is_refused():
    with pytest.raises(ValueError, match="same path"):
        checkpoint._named_leaves({"a": {"b": 1}, "a/b": 2})
