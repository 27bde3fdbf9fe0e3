"""What the compiler is told about the student's programs."""

from cosr_jax.student.compiling import compiler_options


def test_a_level_in_the_environment_stays(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options() == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_backend_optimization_level=0")
    assert compiler_options() is None
