"""Several teachers: what they share counts for more, they check each other, and any may be lost."""

import contextlib
import json

import pytest
from openai_server import OpenAiServer, answer, error
from scripted_students import (
    SKILLS,
    SUITE,
    Student,
    Teacher,
    diagnose,
    make_curator,
    make_lab,
)

from cosr_jax.curator.analysis import Weakness
from cosr_jax.curator.audit import audit

WEAK = Student({("addition", "logic"): 0.5})
QUICK = {"max_attempts": 1, "max_reasks": 0, "deadline_s": 10.0}


@contextlib.contextmanager
def school(*acts, **llm):
    """A curator with one endpoint for each act, named a, b, ..., that all analyse."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(OpenAiServer(act)) for act in acts]
        endpoints = tuple(f"{n} {s.url}" for n, s in zip("abcd", servers, strict=False))
        yield make_curator(endpoints=endpoints, analysts=len(acts), **{**QUICK, **llm})


def plan(curator, student=WEAK, number=1):
    return curator.plan(diagnose(student, number, seed=number), make_lab(student, number))


def asked(act):
    """The roles that a teacher was asked in."""
    names = {"failures": "analyst", "arms": "planner", "weakness": "author"}
    return [names[next(n for n in names if n in json.loads(p)["data"])] for p in act.prompts]


def claims(curator):
    return {
        (f["weakness"]["skill"], f["weakness"]["kind"]): f for f in curator.chains[-1]["findings"]
    }


class Claims(Teacher):
    """Claims what it is told to, of any failures of the skill."""

    def __init__(self, *weaknesses):
        super().__init__()
        self._weaknesses = weaknesses

    def _analyse(self, failures):
        return [
            {
                "skill": skill,
                "kind": kind,
                "evidence_task_ids": [f["id"] for f in failures if f["skill"] == skill][:3],
                "severity": severity,
                "rationale": "it seems so",
            }
            for skill, kind, severity in self._weaknesses
        ]


def test_claims_of_two_models_are_one_with_the_evidence_of_both():
    one = Claims(("addition", "logic", 0.9), ("subtraction", "format", 0.2))
    two = Claims(("addition", "arithmetic", 0.4))  # the verifier cannot tell it from logic
    with school(one, two) as curator:
        plan(curator)
    found = claims(curator)
    assert set(found) == {("addition", "logic"), ("subtraction", "format")}
    assert found["addition", "logic"]["weakness"]["teachers"] == ["a", "b"]
    assert found["subtraction", "format"]["weakness"]["teachers"] == ["a"]
    assert found["addition", "logic"]["is_accepted"]
    assert not found["subtraction", "format"]["is_accepted"]  # shared or not, it has to show
    figures = curator.figures()
    assert figures["curator/llm/claims_shared"] == 1.0
    assert figures["curator/llm/calls/analyst"] == 2.0


def test_a_shared_claim_needs_no_correction_and_still_has_to_reproduce():
    student = Student({("addition", "logic"): 0.34})
    diagnosis = diagnose(student, seed=3)

    def test_of(teachers, weak="addition"):
        others = [skill for skill in SKILLS if skill != weak][:6]
        made = [
            Weakness(
                skill,
                "logic",
                tuple(f.task.task_id for f in diagnosis.failures if f.task.skill == skill),
                0.5,
                "",
                teachers if skill == weak else ("a",),
            )
            for skill in (weak, *others)
        ]
        lab = make_lab(student, 3)
        return audit(made, diagnosis.failures, SUITE.cells(), lab, 24, 0.05, 0.2)[0]

    alone, shared = test_of(("a",)), test_of(("a", "b"))
    assert (alone.failed, alone.samples) == (shared.failed, shared.samples)
    assert shared.p_value < alone.p_value
    assert (alone.is_accepted, shared.is_accepted) == (False, True)
    # What two models invent together is no truer for it.
    assert not test_of(("a", "b"), weak="multiplication").is_accepted


def test_what_two_models_invent_about_a_healthy_student_is_rejected():
    both = [Teacher(inventions=8, seed=5), Teacher(inventions=8, seed=5)]  # the same inventions
    with school(*both, tasks_per_round=4) as curator:
        plan(curator, Student({}))
    findings = curator.chains[-1]["findings"]
    assert sum(f["weakness"]["teachers"] == ["a", "b"] for f in findings) >= 5
    assert not any(f["is_accepted"] for f in findings)


GARBAGE = {
    "down": error(503, "overloaded"),
    "locked": error(401, "who are you"),
    "babbling": answer("I think the student is lazy."),
    "lying": answer('{"weaknesses": [{"skill": "chess", "kind": "style"}]}'),
    "silent": answer(None),
    "html": answer("<html><body>Bad gateway</body></html>"),
    "refusing": answer("I'm sorry, I can't help with that."),
}


@pytest.mark.parametrize("act", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_a_lost_teacher_is_done_without(act, is_first):
    good = Teacher()
    with school(*((act, good) if is_first else (good, act))) as curator:
        made = plan(curator)
    assert curator.chains[0]["fallback"] == ""
    assert made.strategy == "targeted" and made.authored
    assert sorted(set(asked(good))) == ["analyst", "author", "planner"]
    lost = {k: v for k, v in curator.figures().items() if "analysts_lost/" in k}
    assert sum(lost.values()) == 1.0
    assert claims(curator)["addition", "logic"]["weakness"]["teachers"] == [
        "b" if is_first else "a"
    ]


def test_all_teachers_lost_is_the_procedural_curators_turn():
    with school(error(500, "no"), answer("no idea"), error(503, "later")) as curator:
        made = plan(curator)
    assert curator.chains[0]["fallback"] == "http_500"
    assert made.reason.startswith("fallback to the procedural curator")


def test_a_teacher_that_is_lost_for_a_round_comes_back():
    first, second = Teacher(), Teacher()
    with OpenAiServer(second) as server, OpenAiServer(first) as other:
        port = other.server_address[1]
        endpoints = (f"a {other.url}", f"b {server.url}")
        settings = {"breaker_failures": 1, "breaker_cooldown_s": 0.001, **QUICK}
        curator = make_curator(endpoints=endpoints, analysts=2, **settings)
        teachers = []
        for number in (1, 2, 3):
            if number == 2:
                other.__exit__(None, None, None)
            if number == 3:
                back = OpenAiServer(first, port=port)
                back.__enter__()
            curator.observe_gain(plan(curator, number=number), 0.0)
            teachers.append(claims(curator)["addition", "logic"]["weakness"]["teachers"])
        back.__exit__(None, None, None)
    assert teachers == [["a", "b"], ["b"], ["a", "b"]]
    assert [chain["fallback"] for chain in curator.chains] == ["", "", ""]


class Solver(Teacher):
    """A teacher that solves exercises as well: by the suite's own grammar, or wrongly."""

    def __init__(self, is_right=True):
        super().__init__()
        self._is_right = is_right
        self.solved = 0

    def reply(self, body):
        data = json.loads(body["messages"][1]["content"])["data"]
        if "exercise" not in data:
            return super().reply(body)
        self.solved += 1
        words = data["exercise"].replace("?", " ").replace(".", " ").split()
        total = sum(int(word) for word in words if word.isdigit())
        return f"It is \\boxed{{{total if self._is_right else total + 1}}}"


def test_a_task_of_one_teachers_is_solved_by_another():
    author, solver = Solver(is_right=False), Solver()
    with school(author, solver) as curator:
        made = plan(curator)
    assert (author.solved, solver.solved) == (0, len(made.authored) + _out_of_zone(curator))
    assert made.authored and "disputed" not in curator.chains[0]["authored"]["refused"]


def test_the_author_by_failover_does_not_check_itself():
    # The preferred author is down, so the second writes; the third, not the second, checks.
    class NoAuthor(Solver):
        def __call__(self, exchange):
            data = json.loads(exchange.body["messages"][1]["content"])["data"]
            if "order" in data or "exercise" in data:
                return exchange.respond(503, b"{}")
            return super().__call__(exchange)

    down, author, solver = NoAuthor(), Solver(), Solver(is_right=False)
    with school(down, author, solver, breaker_failures=50) as curator:
        plan(curator)
    assert author.solved == 0 and solver.solved > 0
    assert curator.chains[0]["fallback"] == "too_few_tasks"  # all of them disputed


def _out_of_zone(curator):
    refused = curator.chains[0]["authored"]["refused"]
    return refused.get("zone", 0) + refused.get("unjudged", 0)


def test_several_analysts_replay_from_recordings(tmp_path):
    settings = {"folder": str(tmp_path / "answers")}
    one, two = Teacher(inventions=2, seed=1), Teacher(inventions=2, seed=2)
    with school(one, two, mode="record", **settings) as curator:
        made, chain = plan(curator), curator.chains[0]
        replaying = make_curator(
            endpoints=("a http://127.0.0.1:9/v1", "b http://127.0.0.1:9/v1"),
            analysts=2,
            mode="replay",
            **QUICK,
            **settings,
        )
    assert plan(replaying) == made and replaying.chains[0] == chain
