"""Programs are compiled once for a shape, and whoever breaks that is told."""

from __future__ import annotations

import gc
import logging

import jax
import jax.numpy as jnp
import numpy as np

from cosr_jax.run.programs import CountedProgram, heap_set_aside, keep_programs


def test_a_second_compilation_for_a_known_shape_is_counted_and_told(caplog):
    double = CountedProgram("double", jax.jit(lambda x: 2 * x))
    with caplog.at_level(logging.WARNING):
        for size in (3, 4, 3, 4):
            assert double(jnp.ones(size)).shape == (size,)
        assert double.compilations == 2
        assert not caplog.records
        double(np.ones(3, np.int32))
    assert double.compilations == 3
    assert "double program was compiled again" in caplog.text


def test_programs_go_to_the_users_cache_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        folder = keep_programs()
        assert folder is not None and folder.parent == tmp_path
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
        assert keep_programs() == tmp_path / "chosen"
        jax.config.update("jax_enable_compilation_cache", False)
        assert keep_programs() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_heap_is_set_aside_for_a_while():
    before, often = gc.get_freeze_count(), gc.get_threshold()
    with heap_set_aside():
        assert gc.get_freeze_count() > before + 1000
        assert gc.get_threshold()[0] >= 10_000
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == often
