"""The launch scripts build the command line that their headers promise."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
TRAIN = ["cosr", "train", "--config=configs/quickstart.py", "--config.eval.test=('a=*:1',)"]


def run(script, *args, **env):
    return subprocess.run(
        ["bash", LAUNCH / script, *args],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/home/user", **env},
    )


def test_tpu_command_survives_the_remote_shell():
    done = run("tpu_pod.sh", "--dry-run", "pod", "us-east5-a", "--", *TRAIN)
    words = shlex.split(done.stdout)
    assert words[:-1] == [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"],
        *["--zone=us-east5-a", "--worker=all"],
    ]
    remote = words[-1].removeprefix("--command=")
    assert shlex.split(remote) == ["cd", "cosr_jax", "&&", "exec", *TRAIN]


def test_tpu_command_passes_the_compilation_cache_on():
    env = {"JAX_COMPILATION_CACHE_DIR": "/mnt/my cache", "COSR_REMOTE_DIR": "src"}
    done = run("tpu_pod.sh", "--dry-run", "pod", "us-east5-a", "--", "cosr", "doctor", **env)
    remote = shlex.split(done.stdout)[-1].removeprefix("--command=")
    assert shlex.split(remote) == [
        *["cd", "src", "&&", "export", "JAX_COMPILATION_CACHE_DIR=/mnt/my cache", "&&"],
        *["exec", "cosr", "doctor"],
    ]


def test_gpu_node_runs_the_command_with_its_settings():
    done = run("gpu_node.sh", "--dry-run", *TRAIN, XLA_PYTHON_CLIENT_MEM_FRACTION="0.7")
    words = shlex.split(done.stdout)
    assert words[-len(TRAIN) :] == TRAIN and "srun" not in words
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.7" in words
    assert "JAX_COMPILATION_CACHE_DIR=/home/user/.cache/cosr_jax/xla" in words


def test_gpu_node_starts_one_process_for_each_gpu_of_an_allocation(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$JAX_OPTIMIZATION_LEVEL"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("gpu_node.sh", *TRAIN, PATH=path, SLURM_JOB_ID="1", SLURM_GPUS_ON_NODE="8")
    assert done.stdout.splitlines() == ["--ntasks-per-node=8", "--kill-on-bad-exit=1", *TRAIN, "O1"]


@pytest.mark.parametrize(
    ("script", "args", "env"),
    [
        ("tpu_pod.sh", [], {}),
        ("tpu_pod.sh", ["pod", "zone", "cosr", "train"], {}),
        ("gpu_node.sh", ["--dry-run"], {}),
        ("gpu_node.sh", ["cosr", "train"], {"SLURM_JOB_ID": "1"}),
    ],
)
def test_a_wrong_call_is_one_line(script, args, env):
    done = run(script, *args, **env)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "usage: launch/" in line or "--gpus-per-node=8" in line
