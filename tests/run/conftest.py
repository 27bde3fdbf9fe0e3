"""What the tests of whole runs share: a student on disk, compiled programs, an unbroken run."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import finish, settings, start
from tiny_student import write_student


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory):
    """Compiled programs on disk: every run builds the same ones."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, student, program_cache):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    finish(start(settings(student), workdir, program_cache))
    return workdir


@pytest.fixture
def here(monkeypatch, program_cache):
    """Runs inside the test's process use one of its simulated devices, and the stored programs."""
    monkeypatch.setattr("cosr_jax.run.rooms.training_mesh", lambda config: None)
    wanted = {
        "jax_compilation_cache_dir": str(program_cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
