"""What pairs, sequences and second opinions have to show before their tasks are used."""

import dataclasses
import json

from openai_server import OpenAiServer, answer, completion
from scripted_students import Student, Teacher, diagnose, judge, make_curator, make_lab

from cosr_jax.curator.authoring import contrasting, falling, leading
from cosr_jax.types import AUTHORED, Task


def task(prompt, answer="1"):
    return Task("math", "s", 0.5, prompt, answer, prompt, f"\\boxed{{{answer}}}", AUTHORED)


def places(tasks):
    return {task.task_id: place for place, task in enumerate(tasks)}


def test_pairs_differ_in_one_place_and_not_in_their_solutions_alone():
    more, fewer = (
        task("Ann has 3 more than 5. How many?", "8"),
        task("Ann has 3 fewer than 5. How many?", "2"),
    )
    same = task("Ben has 2 apples. How many?", "2"), task("Ben has 2 pears. How many?", "2")
    far = task("Cy buys 4 pens. How many?", "4"), task("Dee sells 6 cups. How few?", "6")
    tasks = [more, fewer, *same, *far]
    assert contrasting(tasks, places(tasks), judge) == [more, fewer]
    # Half a pair is none, and two halves are no pair.
    assert contrasting([more, same[0]], places(tasks), judge) == []
    assert contrasting([], {}, judge) == []


def test_a_progression_falls():
    tasks = [task(f"step {number}") for number in range(5)]

    def kept(*rates):
        measured = {t.task_id: rate for t, rate in zip(tasks, rates, strict=True)}
        return [int(t.prompt[-1]) for t in falling(tasks, measured)]

    assert kept(0.8, 0.7, 0.7, 0.4, 0.2) == [0, 1, 2, 3, 4]
    assert kept(0.8, 0.3, 0.6, 0.5, 0.2) == [0, 2, 3, 4]
    assert kept(0.5, 0.5, 0.5, 0.5, 0.5) == []
    assert kept(0.2, 0.3, 0.4, 0.5, 0.6) == []
    assert falling([], {}) == []


def step(prompt, answer, solution):
    return dataclasses.replace(task(prompt, answer), solution=f"{solution} \\boxed{{{answer}}}")


def test_steps_lead_to_a_failed_task():
    parent = task("Each of 3 boxes holds 4 red and 5 blue pens. How many pens?", "27")
    inside = step("A box holds 4 red and 5 blue pens. How many?", "9", "4 + 5 = 9")
    whole = step("3 boxes hold 9 pens each. How many?", "27", "3 * 9 = 27")
    aside = step("What is 100 / 4?", "25", "100 / 4 = 25")
    other = step("2 boxes hold 9 pens each. How many?", "18", "2 * 9 = 18")
    assert leading([inside, whole], [parent], judge) == [inside, whole]
    assert leading([inside, aside, whole], [parent], judge) == [inside, whole]
    assert leading([aside, whole], [parent], judge) == []  # nothing of it is needed
    assert leading([inside, other], [parent], judge) == []  # it ends elsewhere
    assert leading([whole], [parent], judge) == leading([inside, whole], [], judge) == []
    # 9 is needed, 90 or 0.9 are not 9.
    tens = step("3 boxes hold 90 pens less 243. How many?", "27", "3 * 90 - 243 = 27")
    assert leading([inside, tens], [parent], judge) == []


class Checker:
    """Solves every exercise of the teacher's but those that end in an even number."""

    def __init__(self):
        self.asked = 0

    def __call__(self, exchange):
        self.asked += 1
        exercise = json.loads(exchange.body["messages"][1]["content"])["data"]["exercise"]
        right = sum(int(word) for word in exercise.replace("?", " ").replace(".", " ").split()
                    if word.isdigit())  # fmt: skip
        text = f"So it is \\boxed{{{right + (right % 2 == 0)}}}"
        exchange.respond(200, json.dumps(completion(text)).encode())


def plan_with(checker, **llm):
    student = Student({("addition", "logic"): 0.5})
    with OpenAiServer(Teacher()) as author, OpenAiServer(checker) as other:
        endpoints = (f"author {author.url}", f"other {other.url}")
        curator = make_curator(
            endpoints=endpoints, roles=("analyst=author", "planner=author", "author=author",
                                        "checker=other"), max_attempts=1, **llm)  # fmt: skip
        plan = curator.plan(diagnose(student, seed=1), make_lab(student))
    return plan, curator.chains[0]["authored"]


def test_tasks_that_another_model_solves_otherwise_are_disputed():
    checker = Checker()
    plan, authored = plan_with(checker)
    assert checker.asked > 0
    assert authored["refused"]["disputed"] > 0
    assert plan.authored and all(int(task.answer) % 2 for task in plan.authored)


def test_a_lost_checker_stops_nobody():
    plan, authored = plan_with(answer(None))
    assert "disputed" not in authored["refused"]
    assert any(int(task.answer) % 2 == 0 for task in plan.authored)
    assert dataclasses.asdict(plan)["strategy"] == "targeted"
