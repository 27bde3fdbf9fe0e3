"""The launch scripts build the command line that their headers promise."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
TRAIN = ["cosr", "train", "--config=configs/quickstart.py", "--config.eval.test=('a=*:1',)"]


def run(script, *args, **env):
    return subprocess.run(
        ["bash", LAUNCH / script, *args],
        capture_output=True,
        text=True,
        timeout=240,
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
        ("curator_server.sh", ["--prot=1"], {"COSR_VLLM": "sh"}),
        ("curator_server.sh", ["--port=x"], {"COSR_VLLM": "sh"}),
        ("curator_server.sh", ["--host=0.0.0.0"], {"COSR_VLLM": "sh"}),
        ("curator_server.sh", [], {"COSR_VLLM": "/nowhere/vllm"}),
    ],
)
def test_a_wrong_call_is_one_line(script, args, env):
    done = run(script, *args, **env)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert any(
        words in line
        for words in (
            *["usage: launch/", "--gpus-per-node=8", "see the head of this file", "--port=x"],
            *["CURATOR_KEY", "/nowhere/vllm is not here"],
        )
    )


#: Serves /health with 503, then 200; ends as it is told to.
FAKE_VLLM = """#!{python}
import http.server, os, signal, sys
port, answers = int(sys.argv[sys.argv.index("--port") + 1]), iter([503])
if "--broken" in sys.argv:
    sys.exit(7)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(answers, 200))
        self.end_headers()
    def log_message(self, *args):
        pass
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(sys.argv[1:3], os.environ.get("VLLM_API_KEY"), flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path):
    """A path on which ``vllm`` is the fake one, and a free port."""
    fake = tmp_path / "vllm"
    fake.write_text(FAKE_VLLM.format(python=sys.executable))
    fake.chmod(0o755)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "port": port}


def serve(vllm, *args, **env):
    return subprocess.Popen(
        ["bash", LAUNCH / "curator_server.sh", f"--port={vllm['port']}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": vllm["PATH"], "HOME": "/home/user", **env},
    )


def test_curator_server_asks_vllm_for_what_the_model_needs():
    done = run(
        "curator_server.sh", "--dry-run", "--gpus=2", "120b", "--", "--seed=1", COSR_VLLM="sh"
    )
    assert shlex.split(done.stdout) == [
        *["VLLM_SYSTEM_START_DATE=2026-01-01", "sh", "serve", "openai/gpt-oss-120b"],
        *["--served-model-name", "curator", "--host", "127.0.0.1", "--port", "8000"],
        *["--tensor-parallel-size", "2", "--max-model-len", "65536", "--seed=1"],
    ]
    one_card = run("curator_server.sh", "--dry-run", "120b", COSR_VLLM="sh").stdout
    assert "--gpu-memory-utilization 0.95 --max-num-batched-tokens 1024" in one_card
    other = run(
        *["curator_server.sh", "--dry-run", "--context=8192", "--name=small", "some/model"],
        COSR_VLLM=sys.executable,
    )
    words = shlex.split(other.stdout)
    assert words[1:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert words[5:8] == ["some/model", "--served-model-name", "small"] and words[-1] == "8192"


def test_curator_server_waits_until_vllm_is_ready_and_takes_it_along(vllm):
    with serve(vllm, "20b", CURATOR_KEY="sesame") as process:
        assert process.stdout.readline() == "['serve', 'openai/gpt-oss-20b'] sesame\n"
        ready = process.stderr.readline()
        assert f"cosr doctor --curator=http://127.0.0.1:{vllm['port']}/v1" in ready
        taken = serve(vllm, "--wait=1")
        assert "is taken" in taken.communicate(timeout=240)[1] and taken.returncode == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=240) == 143
    with socket.socket() as again, pytest.raises(ConnectionRefusedError):
        again.connect(("127.0.0.1", vllm["port"]))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--", "--broken"], "vLLM ended with code 7 before it was ready"),
        (["--wait=1"], "vLLM was not ready after 1 s"),
        (["--wait=1", "--", "--stubborn"], "vLLM was not ready after 1 s"),
    ],
)
def test_curator_server_gives_up_in_one_line(args, words, vllm):
    with serve(vllm, *args) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    [line] = err.splitlines()
    assert words in line
