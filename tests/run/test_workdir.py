"""One live run per folder, one config per run, and a clear sentence for everything else."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import yaml

from cosr_jax.config import RunConfig, to_dict
from cosr_jax.run.workdir import open_workdir, read_config
from cosr_jax.types import UserError

CONFIG = RunConfig()
OTHER = dataclasses.replace(CONFIG, seed=7)


def test_it_makes_the_layout_and_saves_the_resolved_config(tmp_path):
    with open_workdir(tmp_path / "a" / "run", CONFIG) as workdir:
        assert yaml.safe_load(workdir.config_file.read_text()) == to_dict(CONFIG)
        for folder in (workdir.checkpoints, workdir.tensorboard, workdir.samples, workdir.export):
            assert folder.is_dir() and folder.parent == tmp_path / "a" / "run"
        assert workdir.report_json.parent == workdir.report_md.parent == workdir.path
    assert read_config(tmp_path / "a" / "run") == CONFIG


def test_the_same_config_reopens_and_leaves_the_file_alone(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        before = workdir.config_file.stat().st_mtime_ns
    with open_workdir(tmp_path, CONFIG) as workdir:
        assert workdir.config_file.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("config.yaml.*"))


def test_a_changed_config_is_refused_with_its_keys_unless_allowed(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    with pytest.raises(UserError, match=r"config\.seed: 0 -> 7"):
        open_workdir(tmp_path, OTHER)
    assert read_config(tmp_path) == CONFIG

    open_workdir(tmp_path, OTHER, allow_config_change=True).close()
    assert read_config(tmp_path) == OTHER
    assert yaml.safe_load((tmp_path / "config.yaml.1").read_text()) == to_dict(CONFIG)

    open_workdir(tmp_path, CONFIG, allow_config_change=True).close()
    assert yaml.safe_load((tmp_path / "config.yaml.2").read_text()) == to_dict(OTHER)


@pytest.mark.parametrize("content", [b"seed: [", b"just words", b"", b"\xff\xfe\x00seed"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    for opening in (lambda: open_workdir(tmp_path, CONFIG), lambda: read_config(tmp_path)):
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            opening()


def test_a_workdir_without_config_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path)


def test_a_saved_value_that_is_not_accepted_names_the_file(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        saved = to_dict(CONFIG)
        saved["lora"]["rank"] = 0
        workdir.config_file.write_text(yaml.safe_dump(saved))
    with pytest.raises(UserError, match=r"config\.yaml: config\.lora\.rank"):
        read_config(tmp_path)


def test_a_refused_opening_gives_the_lock_back(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    with pytest.raises(UserError, match="another config"):
        open_workdir(tmp_path, OTHER)
    open_workdir(tmp_path, CONFIG).close()


def test_files_in_the_way_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is not a folder"):
            open_workdir(path, CONFIG)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("")
    with pytest.raises(UserError, match="samples is not a folder"):
        open_workdir(tmp_path / "run", CONFIG)


def test_an_unwritable_folder_is_named():
    # /proc refuses every new entry, to root as well.
    with pytest.raises(UserError, match=r"--workdir=/proc/run cannot be written"):
        open_workdir("/proc/run", CONFIG)


def test_remote_paths_are_refused_clearly():
    with pytest.raises(UserError, match="not supported yet"):
        open_workdir("gs://bucket/run", CONFIG)


_HOLDER = """
import os, sys, time
from cosr_jax.config import RunConfig
from cosr_jax.run.workdir import open_workdir
workdir = open_workdir(sys.argv[1], RunConfig())
if not os.fork():
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
sys.stdin.read()
"""


def test_a_live_process_keeps_others_out_and_kill_9_frees_the_folder(tmp_path):
    """Even while a forked worker of the killed process lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        worker = int(holder.stdout.readline())
        for _ in range(2):  # the first refusal must not wipe the holder's name
            with pytest.raises(UserError, match=rf"in use by pid {holder.pid} on "):
                open_workdir(tmp_path, CONFIG)
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        os.kill(worker, 0)  # still there
        try:
            open_workdir(tmp_path, CONFIG).close()
        finally:
            os.kill(worker, signal.SIGKILL)
    with open_workdir(tmp_path, CONFIG):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
        with pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
            open_workdir(tmp_path, CONFIG)


def test_children_do_not_inherit_the_lock(tmp_path):
    child = None
    try:
        with open_workdir(tmp_path, CONFIG):
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        open_workdir(tmp_path, CONFIG).close()
    finally:
        if child is not None:
            child.kill()
            child.communicate()
