"""Test-wide settings: eight simulated CPU devices, strict promotion, no network, no deadlines."""

import os
import signal
from importlib.metadata import version

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# The tests' programs run for milliseconds and compile for seconds, most of them where fused
# operations become machine code: without the optimizing emitters that takes a fifth of the time.
# Later versions of XLA have no others, and end the process that asks for them.
_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    f" --xla_cpu_parallel_codegen_split_count=1{_EMITTERS}",
)

# A shell's background job, and every process that it starts, ignores interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Tests, their worker processes and the programs they start compile each program once."""
    cache = config.cache
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
