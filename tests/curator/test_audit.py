"""Planted weaknesses are found and invented ones are not; the statistics have known values."""

import itertools
import math

import pytest
from openai_server import OpenAiServer
from scripted_students import (
    KINDS,
    SKILLS,
    Student,
    Teacher,
    diagnose,
    make_curator,
    make_lab,
    symptom,
)

from cosr_jax.curator.analysis import Weakness
from cosr_jax.curator.audit import audit, binomial_tail, fisher_exact, holm, shows
from cosr_jax.types import Outcome, Verdict

#: Five defects each: (skill, kind) -> share of answers that it spoils.
STUDENTS = {
    "careless": {(skill, "logic"): 0.7 for skill in SKILLS[:5]},
    "sloppy": {(skill, "format"): 0.8 for skill in SKILLS[3:8]},
    "hasty": {(skill, "incomplete"): 0.6 for skill in (*SKILLS[:2], *SKILLS[5:8])},
    "mixed": dict(
        zip(zip(SKILLS[1:6], KINDS, strict=True), (0.6, 0.7, 0.8, 0.9, 0.6), strict=True)
    ),
}


def run(student, inventions, seed):
    """(findings, plan) of one round with a teacher that invents."""
    with OpenAiServer(Teacher(inventions, seed)) as server:
        curator = make_curator(server.url)
        plan = curator.plan(diagnose(student, seed=seed), make_lab(student, round_=seed))
        return curator.chains[-1]["findings"], plan, curator


def is_true(student, claim):
    planted = {(skill, symptom(kind)) for skill, kind in student.defects}
    return (claim["skill"], symptom(claim["kind"])) in planted


def test_planted_weaknesses_are_accepted_and_invented_ones_rejected():
    untrue = rejected = 0
    for name, defects in STUDENTS.items():
        for seed in (1, 2, 3):
            student = Student(defects)
            findings, _, curator = run(student, inventions=14, seed=seed)
            found = set()
            for finding in findings:
                claim = finding["weakness"]
                if is_true(student, claim):
                    if finding["is_accepted"]:
                        found.add((claim["skill"], symptom(claim["kind"])))
                else:
                    untrue += 1
                    rejected += not finding["is_accepted"]
            assert len(found) >= 4, (name, seed, found)
            figures = curator.figures()
            accepted = sum(finding["is_accepted"] for finding in findings)
            assert figures["curator/llm/claims"] == len(findings)
            assert figures["curator/llm/claims_hallucinated"] == len(findings) - accepted
    assert untrue >= 100
    assert rejected / untrue >= 0.95


def test_a_healthy_student_has_no_weakness():
    for seed in range(1, 6):
        findings, plan, _ = run(Student({}), inventions=20, seed=seed)
        assert len(findings) >= 10  # of one skill and symptom are one
        assert not any(finding["is_accepted"] for finding in findings)
        assert plan.authored == ()


def test_different_defects_lead_to_different_task_mixes():
    mixes = {}
    for skill in ("addition", "sorting", "equations"):
        student = Student({(skill, "logic"): 0.5})
        _, plan, _ = run(student, inventions=3, seed=1)
        assert plan.authored and {task.skill for task in plan.authored} == {skill}
        mix = {skill: plan.authored_share}
        for cell, weight in plan.mixture:
            name = cell.split("/")[0]
            mix[name] = mix.get(name, 0.0) + (1 - plan.authored_share) * weight
        assert math.isclose(sum(mix.values()), 1.0)
        assert max(mix, key=mix.__getitem__) == skill
        mixes[skill] = mix
    for one, other in itertools.combinations(mixes.values(), 2):
        shared = sum(min(weight, other.get(name, 0.0)) for name, weight in one.items())
        assert shared < 0.5


def test_claims_without_evidence_or_repeated_are_rejected_untested():
    student = Student({("addition", "logic"): 0.9, ("sorting", "logic"): 0.9})
    failures = diagnose(student).failures
    ids = {skill: next(f.task.task_id for f in failures if f.task.skill == skill) for skill in
           ("addition", "sorting")}  # fmt: skip
    claims = [
        Weakness("addition", "logic", (ids["sorting"],), 1.0, ""),
        Weakness("addition", "logic", ("unheard of",), 1.0, ""),
        Weakness("addition", "logic", (ids["addition"],), 1.0, ""),
        Weakness("addition", "arithmetic", (ids["addition"],), 1.0, ""),
    ]
    cells = tuple(f"{skill}/{level}" for skill in SKILLS for level in (1, 2))
    findings = audit(claims, failures, cells, make_lab(student), 24, 0.05, 0.2)
    assert [finding.is_accepted for finding in findings] == [False, False, True, False]
    assert "cites no failure of its skill" in findings[0].reason
    assert "claimed before" in findings[3].reason
    assert findings[2].samples >= 24 and findings[2].base_samples >= 24


def test_without_other_skills_the_tolerated_rate_is_the_comparison():
    student = Student({("addition", "format"): 0.6})
    diagnosis = diagnose(student)
    ids = tuple(f.task.task_id for f in diagnosis.failures if f.task.skill == "addition")
    claims = [Weakness("addition", "format", ids, 1.0, "")]
    cells = ("addition/1", "addition/2")
    (finding,) = audit(claims, diagnosis.failures, cells, make_lab(student), 24, 0.05, 0.2)
    assert finding.is_accepted and finding.base_samples == 0
    (refused,) = audit(claims, diagnosis.failures, cells, make_lab(Student({})), 24, 0.05, 0.2)
    assert not refused.is_accepted


def test_fishers_test_gives_known_values():
    # Fisher's tea tasting: 3 of 4 right by chance (The Design of Experiments, 1935).
    assert fisher_exact(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert fisher_exact(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher_exact(0, 10, 5, 10) == 1.0
    assert binomial_tail(2, 2, 0.5) == 0.25
    assert binomial_tail(0, 7, 0.1) == pytest.approx(1.0)


def test_holm_corrects_in_steps():
    assert holm([0.01, 0.03, 0.04]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("kind", "category", "value_correct", "expected"),
    [
        ("format", "no_answer", False, True),
        ("format", "wrong_answer", True, True),
        ("format", "wrong_answer", False, False),
        ("logic", "wrong_answer", True, False),
        ("logic", "timeout", False, True),
        ("knowledge", "missing_import", False, True),
        ("arithmetic", "runtime_error", False, False),
        ("incomplete", "truncated", False, True),
    ],
)
def test_what_a_kind_shows_as(kind, category, value_correct, expected):
    verdict = Verdict(Outcome.FAIL, 0.0, category, value_correct=value_correct)
    assert shows(kind, verdict) is expected
    assert not shows(kind, Verdict(Outcome.ERROR, 0.0, category, value_correct=value_correct))
