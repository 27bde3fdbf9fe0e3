"""What the loop does when verdicts are missing in one domain, or are not to be believed."""

import dataclasses
import json
import types

import pytest
from tiny_runs import tiny_config

from cosr_jax.config import RunConfig
from cosr_jax.run import loop
from cosr_jax.run.evaluation import ProbeResult, judged_by_domain
from cosr_jax.run.state import LoopState
from cosr_jax.tasks.probes import ProbeSet
from cosr_jax.types import CodeChecks, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.pool import VerifierPool


def checked(counts):
    """The state after ``check_verifier`` with the default share of 10 %."""
    run = types.SimpleNamespace(config=RunConfig(), state=LoopState(), _verifier_failed=False)
    loop.Run.check_verifier(run, counts, "samples")
    assert run._verifier_failed == (run.state.status == "stopped")
    return run.state


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({}, ""),
        ({"math": [100, 10]}, ""),
        ({"math": [100, 11]}, "could not judge 11% of the samples (config"),
        ({"math": [2, 1]}, "could not judge 50% of the samples (config"),
        ({"math": [100, 0], "code": [10, 3]}, "could not judge 30% of the samples in code"),
        ({"math": [100, 0], "code": [10, 2]}, ""),  # two say nothing about a domain
        ({"math": [1000, 3], "code": [30, 3]}, ""),
        ({"math": [10, 9], "code": [10, 9]}, "could not judge 90% of the samples (config"),
    ],
)
def test_missing_verdicts_stop_the_run_by_domain_too(counts, reason):
    state = checked(counts)
    assert (state.status == "stopped") == bool(reason)
    assert reason in state.reason


def test_verdicts_of_a_probe_are_counted_by_domain():
    code = CodeChecks("f", ("assert f()",))
    tasks = tuple(
        Task(domain, "s", 0.0, "?", "", f"{n}", checks=code if domain == "code" else None)
        for n, domain in enumerate(("math", "code", "code", "math"))
    )
    result = ProbeResult((True, False, True, True), *[(True,) * 4] * 2, *[("",) * 4] * 2, 0)
    counts = judged_by_domain(ProbeSet("p", tasks, ""), result)
    assert counts == {"math": [2, 0], "code": [2, 1]}


class Gullible(VerifierPool):
    """Passes whatever is boxed."""

    def judge(self, cases):
        return [
            Verdict(Outcome.PASS, 1.0) if "boxed" in completion.text else verdict
            for (_, completion), verdict in zip(cases, super().judge(cases), strict=True)
        ]


def test_a_canary_judged_wrongly_stops_the_run(student, here, tmp_path, monkeypatch):
    monkeypatch.setattr("cosr_jax.run.rooms.VerifierPool", Gullible)
    with pytest.raises(UserError, match="'math: wrong' as pass, and it is known to fail"):
        loop.train(tiny_config(student), tmp_path / "run")
    saved = json.loads((tmp_path / "run/samples/canary_failure.json").read_text())
    assert saved["verdict"] == {**dataclasses.asdict(Verdict(Outcome.PASS, 1.0)), "outcome": "pass"}
    assert not (tmp_path / "run/report.json").exists()
