"""One run over maths and code: a tiny student that boxes numbers and writes one-line programs."""

import json

import pytest
from tiny_runs import metrics, report, tiny_config
from tiny_student import NEXT, write_student

from cosr_jax.run import loop
from cosr_jax.run.evaluate import evaluate
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.code_problems import code_problem
from cosr_jax.tasks.domains import MATH
from cosr_jax.tasks.files import write_tasks
from cosr_jax.tasks.problems import Course
from cosr_jax.tasks.suite import ProceduralSuite
from cosr_jax.types import UserError
from cosr_jax.verifiers.browser import find_browser

#: Some answers begin a box; of the others some are the program ``f=str``, some ``f=sum``.
POLYGLOT = {
    **NEXT,
    "<|assistant|>": {"\\": 0.45, "f": 0.55},
    "f": {"=": 1.0},
    "=": {"s": 1.0},
    "s": {"t": 0.6, "u": 0.4},
    "t": {"r": 1.0},
    "r": {"<|end|>": 1.0},
    "u": {"m": 1.0},
    "m": {"<|end|>": 1.0},
}


def text_of_a_number(level, dice):
    """``str`` passes and ``sum`` does not."""
    number = dice.between(0, 9999)
    probes = [("", f"f({number})"), ("", f"f({-number})")]
    return code_problem(str(number), f"f of {number} is text.", "f=str", "f", probes)


COURSES = {"math": MATH, "code": Course("code", "", {"py_text": text_of_a_number})}
SETTINGS = {
    "tasks": {"domains": ("math", "code"), "skills": ("counting", "py_text"), "max_level": 1},
    # The form is no matter, so that worked answers come first and GRPO second.
    "curator": {"format_target": 0.0, "min_informative": 0.0, "replay_fraction": 0.25},
    "rollout": {"max_prompt_tokens": 96, "max_new_tokens": 24},
    "train": {"max_rounds": 2, "steps_per_round": 2, "sft_learning_rate": 1e-5},
    "eval": {"test": ("test=*:6",), "validation": "*:6"},
}


@pytest.fixture
def polyglot(tmp_path, monkeypatch):
    def make_source(tasks):
        return ProceduralSuite(tasks.skills, tasks.max_level, tasks.domains, COURSES)

    monkeypatch.setattr("cosr_jax.run.rooms.make_source", make_source)
    return write_student(tmp_path / "polyglot", POLYGLOT)


def test_one_run_practises_both_domains(polyglot, here, tmp_path, monkeypatch):
    studied = []
    study = loop.sft_batch
    monkeypatch.setattr(
        loop,
        "sft_batch",
        lambda examples, shape: studied.extend(examples) or study(examples, shape),
    )
    workdir = tmp_path / "run"
    loop.train(tiny_config(polyglot, **SETTINGS), workdir)

    rows = [row for row in metrics(workdir) if "train/loss" in row]
    assert [("reward/mean" in row) for row in rows] == [False, False, True, True]
    endings = {completion[-2] for _, completion in studied}  # before the end of the turn
    assert len(endings) == 2  # of "}" and of a fence

    lines = (workdir / "samples/train.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    for cell, answers in (("counting/1", {"1", "2"}), ("py_text/1", {"f=str"})):
        ours = [s for s in samples if s["cell"] == cell]
        assert {s["outcome"] for s in ours} == {"pass", "fail"}
        assert {s["answer"].strip() for s in ours if s["outcome"] == "pass"} <= answers
    wrong = [s for s in samples if s["completion"] == "f=sum" and s["cell"] == "py_text/1"]
    assert wrong and all("'int' object is not iterable" in s["detail"] for s in wrong)

    suite = report(workdir)["probes"]["test"]
    assert {name: entry["n"] for name, entry in suite["domains"].items()} == {"math": 6, "code": 6}
    by_domain = sum(sum(d["categories"].values()) for d in suite["domains"].values())
    assert by_domain == sum(suite["categories"].values()) == round(12 * (1 - suite["after"]))


def test_a_file_of_both_domains_is_measured(polyglot, here, tmp_path):
    suite = ProceduralSuite(("counting", "py_text"), 1, ("math", "code"), COURSES)
    tasks = [suite.draw(cell, seed, "test") for cell in suite.cells() for seed in range(4)]
    write_tasks(tmp_path / "both.jsonl", {task.key: task for task in tasks}.values())
    file = {"eval": {**SETTINGS["eval"], "suite_file": str(tmp_path / "both.jsonl")}}
    found = evaluate(tiny_config(polyglot, **{**SETTINGS, **file}), None).to_json()
    domains = found["probes"]["both"]["domains"]
    # Greedily it answers everything with ``f=str``.
    assert {name: d["after"] for name, d in domains.items()} == {"math": 0.0, "code": 1.0}


def test_one_config_names_four_domains(student, here, tmp_path):
    """The suite's own tasks: the student fails those it cannot write, and studies all of them."""
    pytest.importorskip("z3")
    try:
        find_browser()
    except UserError as error:
        pytest.skip(str(error))
    domains = ("math", "code", "proof", "web")
    skills = ("counting", "py_formulas", "witness_factors", "web_documents")
    workdir = tmp_path / "run"
    config = tiny_config(
        student,
        tasks={"domains": domains, "skills": skills, "max_level": 1},
        # No cell counts as mastered by a lucky draw, so that the batch holds one task of each.
        curator={
            "format_target": 0.0,
            "min_informative": 0.0,
            "zone_high": 0.99,
            "diagnosis_samples": 1,
        },
        rollout={
            "prompts_per_step": 4,
            "num_generations": 2,
            "max_prompt_tokens": 320,
            "max_new_tokens": 192,
        },
        train={"max_rounds": 1, "steps_per_round": 1, "sft_learning_rate": 1e-6},
        eval={"test": ("test=*:2",), "validation": "*:1"},
    )
    studied = []
    admit = Admission.admit

    def watching(admission, tasks):
        result = admit(admission, tasks)
        assert result.refused == {}
        studied.extend(result.tasks)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "admit", watching)
        assert loop.train(config, workdir).status == "completed"
    assert sorted(task.domain for task in studied) == sorted(domains)
    suite = report(workdir)["probes"]["test"]
    assert {name: entry["n"] for name, entry in suite["domains"].items()} == dict.fromkeys(
        domains, 2
    )
    assert suite["unjudged"] == 0
