r"""What an authored task must prove before it counts: that its reference solution is right.

Maths: the reference's last boxed value, or without a box its last number, equals ``answer``.
Code: the reference passes all tests, and no test is vacuous: each one asserts something and fails
where every function of the reference is replaced by one that only raises.  The verifier runs the
programs and compares the values; this room only says what to run.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from cosr_jax.curator.overlap import fold
from cosr_jax.types import CodeChecks, Completion, Outcome, Task, Verdict

#: ``protocols.Verifier.judge``: one verdict for each case, in order.
Judge = Callable[[Sequence[tuple[Task, Completion]]], Sequence[Verdict]]

#: Source of the tasks that a curator wrote.
SOURCE = "curator"


class Unproven(Exception):
    """A task that does not prove itself.

    Args:
      reason: "reference", "vacuous" or "unjudged".
      detail: what is wrong, in words.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def as_task(item: Mapping[str, Any]) -> Task:
    """The task that a canonical item of the schema "tasks" describes.

    Raises:
      Unproven: reference or tests are no Python, or the tests do not use the reference.
    """
    prompt, skill, difficulty = item["prompt"], item["skill"], float(item["difficulty"])
    key = fold(prompt) or prompt
    if item["domain"] == "math":
        solution = item["reference_solution"]
        return Task("math", skill, difficulty, prompt, item["answer"], key, solution, SOURCE)
    program = _Program(item["reference_solution"])
    checks = CodeChecks(program.entry_point(item["tests"]), tuple(item["tests"]))
    return Task("code", skill, difficulty, prompt, "", key, program.completion, SOURCE, checks)


def prove(items: Sequence[Mapping[str, Any]], judge: Judge | None) -> list[Unproven | None]:
    """What is wrong with each canonical task; None for those that prove themselves.

    Args:
      items: canonical items of the schema "tasks".
      judge: the verifier; called once, and not at all if nothing needs it.  Without one, maths
        answers are compared as exact rational numbers or as text.

    Raises:
      ValueError: there are code tasks but no judge, or it answered another number of cases.
    """
    results: list[Unproven | None] = []
    cases: list[tuple[Task, Completion]] = []
    plans: list[tuple[int, int, int]] = []  # (item, first case, cases)
    for index, item in enumerate(items):
        try:
            more = _cases(item) if judge else _compare_alone(item)
        except Unproven as error:
            results.append(error)
            continue
        except RecursionError:
            results.append(Unproven("reference", "its program is nested too deeply"))
            continue
        results.append(None)
        plans.append((index, len(cases), len(more)))
        cases += more
    verdicts = list(judge(cases)) if judge and cases else []
    if len(verdicts) != len(cases):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(cases)} cases")
    for index, first, count in plans:
        results[index] = _complaint(items[index]["domain"], verdicts[first : first + count])
    return results


def _cases(item: Mapping[str, Any]) -> list[tuple[Task, Completion]]:
    """The reference with all its tests; for code, then each test alone without the reference."""
    task = as_task(item)
    if item["domain"] == "math":
        return [(task, _completion(rf"\boxed{{{last_value(item['reference_solution'])}}}"))]
    for test in item["tests"]:
        _check_asserts(test)
    program = _Program(item["reference_solution"])
    cases = [(task, _completion(program.completion))]
    for test in item["tests"]:
        assert isinstance(task.checks, CodeChecks)
        alone = dataclasses.replace(task.checks, tests=(test,))
        cases.append((dataclasses.replace(task, checks=alone), _completion(program.hollow)))
    return cases


def _completion(text: str) -> Completion:
    return Completion((), (), text, "stop")


def _compare_alone(item: Mapping[str, Any]) -> list[tuple[Task, Completion]]:
    if item["domain"] != "math":
        raise ValueError("code tasks are proven by running them: parse them with a judge")
    if not _same_value(last_value(item["reference_solution"]), item["answer"]):
        raise Unproven("reference", "the reference does not end in the answer")
    return []


def _complaint(domain: str, verdicts: Sequence[Verdict]) -> Unproven | None:
    if not verdicts:
        return None
    if any(verdict.outcome is Outcome.ERROR for verdict in verdicts):
        return Unproven("unjudged", "the verifier could not judge it")
    reference, *hollow = verdicts
    if domain == "math" and not (reference.outcome is Outcome.PASS or reference.value_correct):
        return Unproven("reference", "the reference does not end in the answer")
    if domain == "code" and reference.outcome is not Outcome.PASS:
        return Unproven("reference", f"the reference fails its tests ({reference.category})")
    for index, verdict in enumerate(hollow):
        if verdict.outcome is Outcome.PASS:
            return Unproven("vacuous", f"test {index} passes without the solution")
    return None


_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(
    r"(?:(?<![\w.)}\]])[-\u2212])?(?:\\[dt]?frac\{[0-9.]+\}\{[0-9.]+\}"
    r"|(?<![\w.\\])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?%?)"
)


def last_value(reference: str) -> str:
    """What a worked maths solution ends in: its last boxed value, or without a box its last number.

    Raises:
      Unproven: there is neither, or the last box is empty or not closed.
    """
    boxes = [box.end() for box in _BOX.finditer(reference)]
    if not boxes:
        numbers = _NUMBER.findall(reference)
        if not numbers:
            raise Unproven("reference", "the reference ends in no value")
        return numbers[-1]
    depth = 1
    depth = 1
    for brace in _BRACE.finditer(reference, boxes[-1]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            value = reference[boxes[-1] : brace.start()].strip()
            if value:
                return value
            break
    raise Unproven("reference", "the last box of the reference is empty or not closed")


_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")
_RATIONAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|[0-9]+/[0-9]+)")


def _same_value(left: str, right: str) -> bool:
    """Whether two answers are the same text or the same rational number."""

    def normal(text: str) -> str:
        text = "".join(text.replace("\u2212", "-").split()).strip("$")
        return _FRACTION.sub(r"\1\2/\3", _THOUSANDS.sub("", text))

    left, right = normal(left), normal(right)
    if left == right:
        return bool(left)
    if not (_RATIONAL.fullmatch(left) and _RATIONAL.fullmatch(right)):
        return False
    try:
        return Fraction(left) == Fraction(right)
    except (ValueError, ZeroDivisionError):  # thousands of digits, or a zero below the line
        return False


_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class _Program:
    """A code reference: a program, or text with fenced blocks of which the last one is it.

    Raises:
      Unproven: it is no Python.
    """

    def __init__(self, reference: str):
        blocks = _FENCE.findall(reference)
        code = blocks[-1] if blocks else reference
        self.completion = reference if blocks else f"```python\n{reference}\n```"
        self._body = _parsed(code, "the reference").body

    def entry_point(self, tests: Sequence[str]) -> str:
        """The last function or class that the tests use.

        Raises:
          Unproven: a test is no Python, or they use none.
        """
        used = set().union(*(_names_used(_parsed(test, "a test")) for test in tests))
        for node in reversed(self._body):
            if isinstance(node, _DEFINITIONS) and node.name in used:
                return node.name
        raise Unproven("vacuous", "the tests use no function or class of the reference")

    @property
    def hollow(self) -> str:
        """The same names and imports, but nothing behind them: every call raises."""
        lines = [ast.unparse(n) for n in self._body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = dict.fromkeys(name for node in self._body for name in _names_bound(node))
        lines += [f"def {n}(*args, **kwargs):\n    raise NotImplementedError" for n in names]
        return "```python\n" + "\n".join(lines) + "\n```"


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _parsed(code: str, what: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes are the author's, not ours
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unproven("reference", f"{what} is no Python") from None


def _names_bound(node: ast.stmt) -> list[str]:
    """What a statement of a module defines or assigns; imports aside."""
    if isinstance(node, _DEFINITIONS):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return []
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store]


def _names_used(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):  # solution.f
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):  # from solution import f
            names |= {alias.name for alias in node.names}
    return names


def _check_asserts(test: str) -> None:
    """Refuses a test in which nothing is asserted, or only what is true of anything."""
    asserts = [n for n in ast.walk(_parsed(test, "a test")) if isinstance(n, ast.Assert)]
    if all(_is_tautology(node.test) for node in asserts):
        raise Unproven("vacuous", "a test asserts nothing")


def _is_tautology(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.Tuple):  # assert (f(1) == 2, "message")
        return bool(node.elts)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return any(_is_tautology(value) for value in node.values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        is_reflexive = isinstance(node.ops[0], ast.Eq | ast.Is | ast.LtE | ast.GtE)
        return is_reflexive and ast.dump(node.left) == ast.dump(node.comparators[0])
    return False
