"""Authored tasks for tests, and a judge that runs the tests' own harmless programs in place."""

from cosr_jax.types import AUTHORED, CodeChecks, Task


def math_task(prompt, answer="1", solution=None):
    solution = f"\\boxed{{{answer}}}" if solution is None else solution
    return Task("math", "s", 0.5, prompt, answer, prompt, solution, AUTHORED)


def code_task(prompt, name, source, tests=("assert total([1, 2]) == 3",)):
    checks = CodeChecks(name, tests)
    solution = f"```python\n{source}\n```"
    return Task("code", "s", 0.5, prompt, "", prompt, solution, AUTHORED, checks)


def run_code(task, text):
    """Whether a fenced program passes the task's tests; only for programs of the tests."""
    names = {}
    try:
        exec(text.removeprefix("```python\n").removesuffix("```"), names)
        for test in task.checks.tests:
            exec(test, names)
    except Exception:
        return False
    return True
