import asyncio
import json
import re

import pytest

from cosr_jax.tasks.splits import Dice
from cosr_jax.tasks.web_skills import WEB
from cosr_jax.types import (
    NUM_LEVELS,
    Completion,
    Outcome,
    Task,
    UserError,
    level_difficulty,
)
from cosr_jax.verifiers.browser import find_browser
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.web import WebJudge, extract_document, read_requirements

CELLS = [(skill, level) for skill in WEB.skills for level in range(1, NUM_LEVELS + 1)]


def drawn(skill, level, seed):
    return WEB.skills[skill](level, Dice("test", skill, level, seed))


def as_task(problem, skill, level):
    return Task(
        "web",
        skill,
        level_difficulty(level),
        f"{problem.ask} {WEB.instruction}",
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


@pytest.mark.parametrize("skill", WEB.skills)
def test_levels_never_share_a_question(skill):
    seen = {}
    for level in range(1, NUM_LEVELS + 1):
        for seed in range(250):
            content = drawn(skill, level, seed).content
            assert seen.setdefault(content, level) == level


@pytest.mark.parametrize(("skill", "level"), CELLS)
def test_the_question_names_all_that_is_looked_for(skill, level):
    for seed in range(30):
        problem = drawn(skill, level, seed)
        wanted = read_requirements(problem.checks.requirements)
        assert extract_document(problem.solution).method == "fence"
        targets = [state for step in wanted.steps for state in (step.target, *step.expect) if state]
        for state in (*wanted.expect, *targets):
            if state.name is not None:
                assert state.name in problem.ask
        for state in wanted.expect:
            for word in (state.text or "").split():
                assert word in problem.ask


def spoilt(task):
    """Solutions that lack one thing each: the script, or else the last thing that is looked for."""
    page = task.solution
    without_script = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    if without_script != page:
        return without_script
    last = json.loads(task.checks.requirements)["expect"][-1]
    word = (last.get("name") or last["text"]).split()[-1]
    return page.replace(word, f"{word[:-1]}?")


def judged(cells):
    async def run():
        tasks = [as_task(drawn(*cell, 0), *cell) for cell in cells]
        judge = WebJudge()
        await judge.start()
        try:
            return [
                (
                    task,
                    *await asyncio.gather(
                        *(
                            judge.judge(task, Completion((), (), text, "stop"), Limits(30.0))
                            for text in (task.solution, spoilt(task))
                        )
                    ),
                )
                for task in tasks
            ]
        finally:
            await judge.close()

    return asyncio.run(run())


def has_chromium():
    try:
        return bool(find_browser())
    except UserError:
        return False


@pytest.mark.skipif(not has_chromium(), reason="Chromium is not installed")
@pytest.mark.parametrize(
    "cells",
    [
        [("web_counters", 5), ("web_fields", 4)],
        pytest.param(CELLS, marks=pytest.mark.slow),
    ],
    ids=["two", "all"],
)
def test_solutions_pass_and_spoilt_ones_fail(cells):
    for task, right, wrong in judged(cells):
        assert right.outcome is Outcome.PASS, (task.cell, right.detail)
        assert wrong.outcome is Outcome.FAIL, (task.cell, wrong.detail)
