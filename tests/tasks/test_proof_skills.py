import asyncio
import importlib.util
import re

import pytest

from cosr_jax.tasks.proof_skills import PROOF
from cosr_jax.tasks.splits import Dice
from cosr_jax.types import NUM_LEVELS, Completion, Outcome, Task, level_difficulty
from cosr_jax.verifiers.dispatch import Workers
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.proof import ProofJudge

CELLS = [(skill, level) for skill in PROOF.skills for level in range(1, NUM_LEVELS + 1)]


def drawn(skill, level, seed):
    return PROOF.skills[skill](level, Dice("test", skill, level, seed))


def as_task(problem, skill, level):
    return Task(
        "proof",
        skill,
        level_difficulty(level),
        f"{problem.ask} {PROOF.instruction}",
        "",
        f"{skill}:{problem.content}",
        problem.solution,
        checks=problem.checks,
    )


@pytest.mark.parametrize(("skill", "level"), CELLS)
def test_draws_are_pure_and_many(skill, level):
    problems = [drawn(skill, level, seed) for seed in range(250)]
    assert problems == [drawn(skill, level, seed) for seed in range(250)]
    assert len({p.content for p in problems}) >= 100


@pytest.mark.parametrize("skill", PROOF.skills)
def test_levels_never_share_a_question(skill):
    seen = {}
    for level in range(1, NUM_LEVELS + 1):
        for seed in range(250):
            content = drawn(skill, level, seed).content
            assert seen.setdefault(content, level) == level


def spoilt(solution):
    """The solution with another last number."""
    *_, last = re.finditer(r"\d+", solution)
    return solution[: last.start()] + str(int(last[0]) * 1000 + 999) + solution[last.end() :]


def judge(cases):
    async def run():
        workers = Workers(count=2)
        try:
            return await asyncio.gather(
                *(
                    ProofJudge(workers).judge(task, Completion((), (), text, "stop"), Limits(5.0))
                    for task, text in cases
                )
            )
        finally:
            await workers.close()

    return asyncio.run(run())


@pytest.mark.skipif(importlib.util.find_spec("z3") is None, reason="z3-solver is not installed")
def test_solutions_pass_and_spoilt_ones_fail():
    cases, expected = [], []
    for skill, level in CELLS:
        for seed in range(2):
            task = as_task(drawn(skill, level, seed), skill, level)
            cases += [
                (task, task.solution),
                (task, spoilt(task.solution)),
                (task, "<answer>0</answer>"),
            ]
            expected += [Outcome.PASS, Outcome.FAIL, Outcome.FAIL]
    for (task, text), verdict, outcome in zip(cases, judge(cases), expected, strict=True):
        assert verdict.outcome is outcome, (task.cell, text, verdict)
        assert verdict.seconds < 5 or outcome is Outcome.FAIL


@pytest.mark.skipif(importlib.util.find_spec("z3") is None, reason="z3-solver is not installed")
def test_other_right_answers_pass_too():
    tasks = {
        cell: as_task(drawn(*cell, 0), *cell)
        for cell in [("proof_bounds", 1), ("witness_factors", 3), ("witness_paths", 2)]
    }
    distance = re.search(r"\d+", tasks["proof_bounds", 1].solution)[0]
    primes = re.findall(r"\d+", tasks["witness_factors", 3].solution)
    path = re.findall(r"\d+", tasks["witness_paths", 2].solution)
    answers = {
        (
            "proof_bounds",
            1,
        ): f"```python\na - {distance} if a > {distance} else {distance} - a\n```",
        ("witness_factors", 3): f"\\boxed{{{', '.join(reversed(primes))}}}",
        ("witness_paths", 2): f"[{', '.join(reversed(path))}]",
    }
    for verdict in judge([(tasks[cell], text) for cell, text in answers.items()]):
        assert verdict.outcome is Outcome.PASS, verdict
