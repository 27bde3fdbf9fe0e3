"""Task files: JSON lines, one problem a line.

    {"id", "domain": "math", "prompt", "answer", "skill", "difficulty"}
    {"id", "domain": "code", "prompt", "entry_point", "tests", "reference_solution"?, "skill",
     "difficulty"}

"tests" is a text or a list of texts, Python statements that hold after the program; each text is
worth the same.  A code problem's reference solution is the program alone, without a fence.  Further
fields are allowed and ignored; worked answers of maths do not travel.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosr_jax.tasks.code_problems import fenced, unfenced
from cosr_jax.types import CodeChecks, Task, UserError

_REQUIRED = {
    "math": ("prompt", "answer", "skill", "difficulty"),
    "code": ("prompt", "entry_point", "tests", "skill", "difficulty"),
}
_FIELDS = ("id", "domain", *dict.fromkeys(sum(_REQUIRED.values(), ())), "reference_solution")


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    """Reads ``config.eval.fields``, e.g. ("prompt=question",), into {our name: the file's name}.

    Raises:
      UserError: an item is not ours=theirs, or a name of ours is unknown or given twice.
    """
    mapping: dict[str, str] = {}
    for item in fields:
        ours, _, theirs = (part.strip() for part in item.partition("="))
        if ours not in _FIELDS or not theirs or ours in mapping:
            raise UserError(
                f"config.eval.fields: {item!r} is not a new ours=theirs",
                f"ours is one of {', '.join(_FIELDS)}; write e.g. prompt=question",
            )
        mapping[ours] = theirs
    return mapping


def read_tasks(path: str | Path, fields: Mapping[str, str] | None = None) -> tuple[Task, ...]:
    """All problems of a task file, in its order; the id becomes the task's key.

    Args:
      path: a JSON-lines file in UTF-8; blank lines are skipped.
      fields: {our name: the file's name} where they differ.

    Raises:
      UserError: the file is missing, empty, not UTF-8, or a line is no valid problem; the message
        names file, line and field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})", "give the path of a JSON-lines task file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8"
        ) from error
    tasks: dict[str, Task] = {}
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            task = _read_line(line, f"{path}:{number}", fields or {}, path.name)
            if task.key in tasks:
                raise UserError(
                    f"{path}:{number}: field 'id': {task.key!r} stands on an earlier line",
                    "give every problem its own id",
                )
            tasks[task.key] = task
    if not tasks:
        raise UserError(f"{path}: holds no problem", "write one JSON object per line")
    return tuple(tasks.values())


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes maths and code tasks; the file appears whole or not at all.

    Raises:
      ValueError: a task has no place in the format: it is of another domain, or a script.
    """
    path = Path(path)
    lines = [json.dumps(_record(task), ensure_ascii=False) + "\n" for task in tasks]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _record(task: Task) -> dict[str, Any]:
    record: dict[str, Any] = {"id": task.key, "domain": task.domain, "prompt": task.prompt}
    if task.domain == "math":
        record["answer"] = task.answer
    elif isinstance(task.checks, CodeChecks) and task.checks.entry_point:
        record |= {"entry_point": task.checks.entry_point, "tests": list(task.checks.tests)}
        if task.solution:
            record["reference_solution"] = unfenced(task.solution)
    else:
        raise ValueError(f"task {task.key!r} of domain {task.domain!r} has no place in a task file")
    return record | {"skill": task.skill, "difficulty": task.difficulty}


def _read_line(line: str, where: str, fields: Mapping[str, str], source: str) -> Task:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: is not JSON ({error})", "write one JSON object per line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: {_short(record)} is no object", "write {...} on each line")

    def wrong(field: str, what: str, remedy: str) -> UserError:
        name = fields.get(field, field)
        return UserError(f"{where}: field {name!r} {what}", remedy)

    def get(field: str) -> Any:
        name = fields.get(field, field)
        if name not in record:
            raise wrong(
                field, "is missing", f"add it, or map it with config.eval.fields={field}=..."
            )
        return record[name]

    def text_of(field: str) -> str:
        value = get(field)
        if not isinstance(value, str) or not value.strip():
            raise wrong(field, f"is {_short(value)}, not a text", "write a text that is not empty")
        return value

    domain = get("domain")
    if not isinstance(domain, str) or domain not in _REQUIRED:
        raise wrong("domain", f"is {_short(domain)}", "write math or code")
    key = get("id")
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
        raise wrong("id", f"is {_short(key)}, not an id", "write a text or an integer")
    difficulty = get("difficulty")
    if (
        isinstance(difficulty, bool)
        or not isinstance(difficulty, (int, float))
        or not 0 <= difficulty <= 1
    ):
        raise wrong("difficulty", f"is {_short(difficulty)}", "write a number from 0 to 1")
    prompt, skill = text_of("prompt"), text_of("skill")
    task = Task(
        domain="math",
        skill=skill,
        difficulty=float(difficulty),
        prompt=prompt,
        answer="",
        key=str(key),
        source=source,
    )
    if domain == "code":
        entry_point, tests = text_of("entry_point"), get("tests")
        statements = tests if isinstance(tests, list) else [tests]
        if not statements or not all(isinstance(test, str) and test.strip() for test in statements):
            raise wrong("tests", f"is {_short(tests)}", "write assert statements")
        has_solution = record.get(fields.get("reference_solution", "reference_solution"))
        return dataclasses.replace(
            task,
            domain="code",
            solution=fenced(text_of("reference_solution")) if has_solution is not None else "",
            checks=CodeChecks(entry_point, tuple(statements)),
        )
    answer = get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    elif not isinstance(answer, str) or not answer.strip():
        raise wrong("answer", f"is {_short(answer)}, not an answer", "write a text or a number")
    return dataclasses.replace(task, answer=answer)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
