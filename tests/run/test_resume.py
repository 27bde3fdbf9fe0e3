"""A run that is killed, stopped or finds a checkpoint damaged ends like one that is not."""

import logging
import os
import random
import signal
import time

import pytest
from tiny_runs import assert_same_run, finish, saved_steps, settings, start, tiny_config

from cosr_jax.run import loop, manifest

#: Minutes of restarts on two cores.
pytestmark = pytest.mark.slow

#: Steps that an unbroken run saves: the baseline, every second step, and the end of each round.
SAVES = (0, 2, 3, 4, 6, 8, 9)


def sealed(workdir):
    """Steps that count, and those that were being written."""
    folders = sorted((workdir / "checkpoints").glob("0*"))
    done = [p.name for p in folders if (p / manifest.NAME).exists()]
    return done, [p.name for p in folders if p.name not in done]


def test_killed_within_a_round_and_again_before_a_seal(unbroken, student, program_cache, tmp_path):
    workdir = tmp_path / "run"
    # The sixth step is lost under way, and the fifth with all that was written of it.  Saving goes
    # on in the background, so step 4 may be lost as well.
    finish(start(settings(student), workdir, program_cache, "update", 6), -signal.SIGKILL)
    assert sealed(workdir)[0][-1] in ("00000003", "00000004")
    # Steps 4 (again, if it was lost), 6 and 8 are saved; the arrays of one lie there without seal.
    finish(start(settings(student), workdir, program_cache, "seal", 2), -signal.SIGKILL)
    (unsealed,) = sealed(workdir)[1]
    assert unsealed in ("00000006", "00000008") and unsealed > sealed(workdir)[0][-1]
    finish(start(settings(student), workdir, program_cache))
    assert_same_run(workdir, unbroken)


@pytest.mark.parametrize("step", [1, 6, 7])
def test_a_signal_saves_and_the_same_call_resumes(
    step, unbroken, student, here, tmp_path, monkeypatch, capsys
):
    take_step = loop.Run.take_step

    def interrupted(run, plan):
        take_step(run, plan)
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "take_step", interrupted)
        assert loop.train(tiny_config(student), workdir) == signal.SIGTERM
    assert "stopped by SIGTERM; the same command resumes" in capsys.readouterr().err
    assert max(saved_steps(workdir)) == step
    assert not (workdir / "report.json").exists()
    loop.train(tiny_config(student), workdir)
    assert f"resuming after step {step}" in capsys.readouterr().out
    assert_same_run(workdir, unbroken)


def test_a_truncated_checkpoint_is_named_skipped_and_made_good(
    unbroken, student, here, tmp_path, monkeypatch, caplog
):
    plan_round = loop.Run.plan_round

    def interrupted(run):
        if run.state.round == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plan_round(run)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "plan_round", interrupted)
        assert loop.train(tiny_config(student), workdir) == signal.SIGTERM
    newest = workdir / "checkpoints/00000006"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    with caplog.at_level(logging.WARNING):
        loop.train(tiny_config(student), workdir)
    (warning,) = [r.getMessage() for r in caplog.records if "skipping checkpoint" in r.getMessage()]
    assert str(newest) in warning and largest.name in warning
    assert_same_run(workdir, unbroken)


def test_twenty_kills_at_random_moments(unbroken, student, program_cache, tmp_path):
    """From outside: fourteen at any time after loading, six while a step is being saved."""
    process = start(settings(student), tmp_path / "timed", program_cache)
    process.stdout.readline()
    loaded = time.monotonic()
    finish(process)
    length = time.monotonic() - loaded
    print(f"an unbroken run takes {length:.1f} s after loading")
    rng = random.Random(0)
    for kill in range(1, 21):
        workdir = tmp_path / f"killed{kill}"
        process = start(settings(student), workdir, program_cache)
        process.stdout.readline()
        loaded = time.monotonic()
        if kill <= 14:
            delay = rng.uniform(0, length)
            _until(process, lambda since=loaded, s=delay: time.monotonic() - since >= s)
            moment = f"{delay:.1f} s after loading"
        else:
            step = SAVES[kill - 15]
            folder = workdir / "checkpoints" / f"{step:08d}"
            _until(process, lambda f=folder: _is_being_saved(f))
            moment = f"while step {step} was being saved"
        outcome = "killed" if process.poll() is None else "had ended"
        process.kill()
        process.communicate()
        done, undone = sealed(workdir)
        finish(start(settings(student), workdir, program_cache))
        assert_same_run(workdir, unbroken)
        print(f"{kill}: {outcome} {moment}, sealed {done}, unsealed {undone}; resumed run equal")


def _until(process, is_time):
    while process.poll() is None and not is_time():
        time.sleep(0.0005)


def _is_being_saved(folder):
    """Whether the step's files, under their final or their temporary name, have no seal yet."""
    return any(folder.parent.glob(f"{folder.name}*")) and not (folder / manifest.NAME).exists()
