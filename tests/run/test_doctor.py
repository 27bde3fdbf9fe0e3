"""Each check finds the fault it is there for."""

import re

import pytest

from cosr_jax.main import main
from cosr_jax.run import doctor
from cosr_jax.types import Outcome, UserError, Verdict


def test_a_sound_machine_passes_in_one_line_for_each_check(capsys, tmp_path):
    assert main(["doctor", f"--workdir={tmp_path / 'new'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.checks(None))
    assert all(line.startswith("ok ") for line in lines)
    assert not (tmp_path / "new").exists()


def test_a_failed_check_is_marked_and_the_others_still_run(capsys, monkeypatch):
    def broken():
        raise UserError("it is broken", "mend it")

    monkeypatch.setattr(
        doctor, "checks", lambda _: (doctor.Check("a", broken), doctor.Check("b", lambda: "fine"))
    )
    assert doctor.doctor() == 1
    assert re.split(r"\s{2,}|\n", capsys.readouterr().out.strip()) == [
        "FAIL a",
        "it is broken; mend it",
        "ok",
        "b",
        "fine",
    ]


def test_a_backend_that_does_not_start(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize\nbackend 'cuda'")

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(UserError, match="Unable to initialize backend 'cuda'; install the extra"):
        doctor.devices()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "single process"),
        ({"SLURM_JOB_ID": "1"}, "SLURM (SLURM_JOB_ID is set)"),
        ({"KUBERNETES_SERVICE_HOST": "x"}, "Kubernetes (KUBERNETES_SERVICE_HOST is set)"),
    ],
)
def test_cluster_kind(environment, found):
    assert doctor.cluster(environment) == found


def test_device_memory_is_told_where_jax_knows_it(monkeypatch):
    assert re.fullmatch(r"host [\d.]+ GiB", doctor.memory())

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 16 * 2**30}

    monkeypatch.setattr("jax.local_devices", lambda: [Device()])
    assert doctor.memory().endswith(", each device 16.0 GiB")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} cannot be written (Permission")):
        doctor.writable(tmp_path / "run")


def test_cached_students_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path))
    assert "the first run fetches its own" in doctor.students()
    (tmp_path / "a-student").mkdir()
    (tmp_path / "a-student" / "config.json").write_text("{}", encoding="utf-8")
    assert doctor.students() == f"a-student in {tmp_path}"


def test_a_verifier_that_cannot_judge(monkeypatch):
    trouble = Verdict(Outcome.ERROR, 0.0, detail="the worker died")
    monkeypatch.setattr(doctor.VerifierPool, "judge", lambda self, cases: [trouble] * len(cases))
    with pytest.raises(UserError, match=r"\['error', 'error'\] \(the worker died; the worker died"):
        doctor.verifier()


def test_no_compiler_is_no_fault_but_a_broken_one_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'cosr-jax[topology]'" in doctor.topology()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_TOPOLOGY", "v5e:nonsense")
    with pytest.raises(UserError, match="libtpu does not give v5e:nonsense"):
        doctor.topology()


def test_sandbox_layers_are_told_with_what_they_lack(monkeypatch):
    faults = {"bubblewrap": "bwrap is not on the PATH", "namespaces": "", "landlock": ""}

    async def probe(layer):
        return faults[layer]

    monkeypatch.setattr(doctor, "probe", probe)
    expected = "namespaces, landlock work (bubblewrap: bwrap is not on the PATH)"
    assert doctor.sandbox() == expected
    faults.update(namespaces="refused", landlock="refused")
    assert doctor.sandbox().startswith("no layer works")
