"""Canaries are judged as they must be, and a verifier that misjudges one stops the run."""

import collections
import importlib.util
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from cosr_jax.config import VerifierConfig
from cosr_jax.types import CodeChecks, Completion, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.canaries import FAILURE_FILE, CanaryWatch, canaries
from cosr_jax.verifiers.extraction import METHODS
from cosr_jax.verifiers.pool import VerifierPool

PASS = Verdict(Outcome.PASS, 1.0)
FAIL = Verdict(Outcome.FAIL, 0.0, "wrong_answer")
ERROR = Verdict(Outcome.ERROR, 0.0)
NEEDS = {"proof": "z3", "gym": "reasoning_gym"}


def case(domain="math"):
    checks = CodeChecks(tests=("assert f()",)) if domain == "code" else None
    task = Task(domain, "s", 0.0, "?", "" if checks else "1", "key", checks=checks)
    return task, Completion((1,), (0.0,), "x", "stop")


class Fake:
    """Judges canaries rightly, but for what ``wrong`` says; other cases fail."""

    def __init__(self, **wrong):
        self.wrong, self.batches = wrong, []

    def judge(self, cases):
        self.batches.append(cases)
        return [self.verdict(task) for task, _ in cases]

    def verdict(self, task):
        for canary in (*canaries("math"), *canaries("code")):
            if canary.task == task:
                if canary.name in self.wrong:
                    return self.wrong[canary.name]
                return PASS if canary.passes else FAIL
        return FAIL

    def close(self):
        self.batches = None


@pytest.mark.parametrize("domain", ["math", "code", "proof", "gym", "web"])
def test_the_real_verifier_judges_every_canary_rightly(domain):
    if domain in NEEDS and importlib.util.find_spec(NEEDS[domain]) is None:
        pytest.skip(f"{NEEDS[domain]} is not installed")
    birds = canaries(domain)
    with VerifierPool(VerifierConfig(wall_s=30.0)) as pool:
        try:
            verdicts = pool.judge([(canary.task, canary.completion) for canary in birds])
        except UserError as error:
            if domain != "web":
                raise
            pytest.skip(str(error))  # no browser
    expected = {canary.name: "pass" if canary.passes else "fail" for canary in birds}
    assert {c.name: v.outcome.value for c, v in zip(birds, verdicts, strict=True)} == expected
    assert {"pass", "fail"} == set(expected.values())


@pytest.mark.parametrize("form", METHODS)
def test_maths_canaries_are_written_in_a_form_that_counts(form):
    birds = canaries("math", (form,))
    with VerifierPool(VerifierConfig(accept=(form,), wall_s=30.0)) as pool:
        verdicts = pool.judge([(canary.task, canary.completion) for canary in birds])
    assert [v.outcome is Outcome.PASS for v in verdicts] == [c.passes for c in birds]


def test_a_domain_is_checked_with_its_first_case_and_after_every_nth(tmp_path):
    fake = Fake()
    watch = CanaryWatch(fake, 5, ("boxed",), tmp_path)
    for domain in ("math", "math", "code", "math", "math", "code", "math"):
        assert watch.judge([case(domain)] * 2) == [FAIL] * 2
    sizes = [len(batch) - 2 for batch in fake.batches]
    math, code = len(canaries("math")), len(canaries("code"))
    assert sizes == [math, 0, code, math, 0, 0, 0]  # the sixth case of maths, not of code


@pytest.mark.parametrize("seed", range(5))
def test_how_often_a_domain_is_checked_does_not_depend_on_the_order_of_calls(tmp_path, seed):
    calls = [["math"] * 4] * 8 + [["code"] * 4] * 5 + [["code", "math"]] * 3
    random.Random(seed).shuffle(calls)
    fake = Fake()
    watch = CanaryWatch(fake, 6, ("boxed",), tmp_path)
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(watch.judge, [case(d) for d in call]) for call in calls]:
            done.result()
    birds = collections.Counter(
        task.domain for batch in fake.batches for task, _ in batch if task.key != "key"
    )
    # 35 cases of maths: with the first, seventh, ... thirty-first; 23 of code.
    assert birds == {"math": 6 * len(canaries("math")), "code": 4 * len(canaries("code"))}


def test_canaries_can_be_switched_off(tmp_path):
    fake = Fake()
    watch = CanaryWatch(fake, 0, ("boxed",), tmp_path)
    watch.judge([case()])
    watch.judge([])
    assert [len(batch) for batch in fake.batches] == [1, 0]


@pytest.mark.parametrize(
    ("wrong", "known_to"),
    [({"math: wrong": PASS}, "fail"), ({"math: right": FAIL}, "pass")],
)
def test_a_misjudged_canary_stops_and_is_saved(tmp_path, wrong, known_to):
    (name,) = wrong
    watch = CanaryWatch(Fake(**wrong), 1, ("boxed",), tmp_path / "samples")
    with pytest.raises(UserError, match=f"'{name}' .* known to {known_to}") as caught:
        watch.judge([case()])
    path = tmp_path / "samples" / FAILURE_FILE
    assert str(path) in caught.value.remedy
    saved = json.loads(path.read_text())
    assert saved["expected"] == known_to
    assert saved["verdict"]["outcome"] != known_to
    assert Task.from_dict(saved["task"]).key == name


def test_a_canary_that_could_not_be_judged_says_nothing(tmp_path):
    watch = CanaryWatch(Fake(**{"math: wrong": ERROR}), 1, ("boxed",), tmp_path)
    assert watch.judge([case()]) == [FAIL]
