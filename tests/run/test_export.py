"""``cosr export`` on a run's folder: which step, which format, where to."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml
from student_fixtures import stirred, write_folder

from cosr_jax.config import LoraConfig, RunConfig, StudentConfig, to_dict
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.export import export
from cosr_jax.student.peft import import_adapter
from cosr_jax.student.weights import load_student
from cosr_jax.train.step import init_state
from cosr_jax.types import UserError

LORA = LoraConfig(rank=2, alpha=4.0, targets=(r"attn\.q_proj",))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    source = write_folder(tmp_path_factory.mktemp("source"), "tiny_llama")
    return source, load_student(StudentConfig(source=str(source)), LORA)


@pytest.fixture
def workdir(student, tmp_path):
    """A run whose step 2 was its best and step 4 its last."""
    source, start = student
    config = RunConfig(student=StudentConfig(source=str(source)), lora=LORA)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with CheckpointStore(tmp_path / "checkpoints", keep=3) as store:
        for step in (2, 4):
            state = init_state(stirred(start.lora, seed=step), config.train)
            store.save(step, state, {}, is_best=step == 2)
    return tmp_path


def imported(folder, student):
    return jax.tree.leaves(import_adapter(folder, student[1], LORA))


@pytest.mark.parametrize(("step", "seed"), [("best", 2), ("latest", 4), (4, 4), (2, 2)])
def test_the_chosen_step_is_exported(step, seed, workdir, student, capsys):
    folder = export(workdir, "peft", step)
    assert folder == workdir / "export" / "peft"
    wanted = jax.tree.leaves(stirred(student[1].lora, seed=seed))
    for got, value in zip(imported(folder, student), wanted, strict=True):
        np.testing.assert_array_equal(got, value)
    assert capsys.readouterr().out == f"{folder}: peft export of step {seed}\n"


def test_merged_weights_are_a_student_of_their_own(workdir, student, tmp_path):
    folder = export(workdir, "merged", "latest", tmp_path / "out")
    merged = load_student(StudentConfig(source=str(folder)), LORA)
    start, lora = student[1], stirred(student[1].lora, seed=4)
    q = ("layers", "attn", "q_proj")
    a, b = (lora[q[0]][q[1]][q[2]][name].get_raw_value() for name in ("lora_a", "lora_b"))
    for (path, got), (_, base) in zip(
        merged.base.flat_state(), start.base.flat_state(), strict=True
    ):
        wanted = base.get_raw_value() + (2.0 * a @ b if path[:-1] == q else 0.0)
        np.testing.assert_allclose(got.get_raw_value(), wanted, atol=1e-6)


def test_a_second_export_replaces_the_first_but_never_a_folder_of_the_user_s(workdir, tmp_path):
    export(workdir, "peft", "best")
    export(workdir, "peft", "latest")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already exists"):
        export(workdir, "peft", "best", mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_steps_and_runs_that_are_not_there_are_named(workdir, student, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 3; choose one of \[2, 4\]"):
        export(workdir, "peft", 3)
    with pytest.raises(UserError, match="does not exist"):
        export(tmp_path / "elsewhere", "peft")
    config = RunConfig(student=StudentConfig(source=str(student[0])), lora=LORA)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(UserError, match="has no checkpoints"):
        export(fresh, "peft")
    with CheckpointStore(fresh / "checkpoints", keep=1) as store:
        store.save(1, init_state(stirred(student[1].lora), config.train), {})
    with pytest.raises(UserError, match="no best checkpoint yet; write --step=1"):
        export(fresh, "peft")


def test_a_config_that_does_not_fit_the_checkpoint_is_refused(workdir, student):
    config = RunConfig(
        student=StudentConfig(source=str(student[0])), lora=dataclasses.replace(LORA, rank=3)
    )
    (workdir / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(UserError, match="does not fit the config"):
        export(workdir, "peft")
