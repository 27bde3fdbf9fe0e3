"""The first signal asks, the second SIGINT insists, and the old handlers come back."""

import os
import signal
import subprocess
import sys

import pytest

from cosr_jax.run.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_nothing_else(number):
    with StopRequest() as stop:
        assert stop.requested == "" and stop.poll(1) == ""
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        assert stop.poll(2) == number.name
    assert stop.requested == number.name


def test_a_second_sigint_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_sigint_after_sigterm_asks_before_it_insists():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"


def test_previous_handlers_return_even_after_an_exception():
    def mine(number, frame):
        raise AssertionError("not to be called")

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError), StopRequest():
            assert signal.getsignal(signal.SIGTERM) is not mine
            _ = 1 / 0
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_importing_and_using_it_does_not_import_jax():
    code = (
        "import sys; from cosr_jax.run.signals import StopRequest\n"
        "with StopRequest() as stop: assert stop.poll(0) == ''\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


_DISTRIBUTED = """
import os, signal, sys, time
import jax
port = sys.argv[1]
jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0, coordinator_bind_address=f"127.0.0.1:{port}")
from cosr_jax.run.signals import StopRequest
with StopRequest() as stop:
    for step in range(600):
        if name := stop.poll(step):
            print(name, step)
            break
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
"""


def test_with_jax_distributed_its_preemption_notice_counts(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", _DISTRIBUTED, str(port)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    name, step = done.stdout.split()
    assert name == "SIGTERM" and int(step) > 2
