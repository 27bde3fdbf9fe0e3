"""Whether a task written by a model gives away, or repeats, one that is known already.

Tasks of a source are kept apart by their keys, which hold the question without its wording.  What
a model writes has no such key, so its words and programs are compared:

- n-grams: 13 words in a row that also stand in an evaluation prompt, or a shorter evaluation
  prompt as a whole, the instruction about the answer's form aside.  N-grams of at least 10
  evaluation prompts are wording that belongs to no one question, and do not count (as in Brown et
  al., arXiv:2005.14165, appendix C).
- programs: a function or class of the reference that equals one of an evaluation task's solution,
  once names, annotations and docstrings are put aside.
- near-duplicates: the same numbers in the same order, and nearly the same words.
"""

from __future__ import annotations

import ast
import collections
import re
import warnings
from collections.abc import Iterable, Sequence

from cosr_jax.tasks.domains import COURSES
from cosr_jax.types import Task

_NGRAM = 13  # words
_COMMON = 10  # evaluation prompts that share an n-gram from which on it is mere wording
_NEAR = 0.8  # Jaccard index of word trigrams from which on prompts are near-duplicates

_WORD = re.compile(r"[^\W_]+|[-+*/=<>^%()]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


class Leakage:
    """Compares tasks with the evaluation.

    Args:
      reserved: all evaluation tasks.
    """

    def __init__(self, reserved: Iterable[Task]):
        tasks = tuple(reserved)
        prompts = {tuple(_words(task.prompt)) for task in tasks}
        counts = collections.Counter(gram for words in prompts for gram in _ngrams(words, _NGRAM))
        self._grams = {gram for gram, count in counts.items() if count < _COMMON}
        self._short = {words for words in prompts if 0 < len(words) < _NGRAM}
        self._lengths = sorted({len(words) for words in self._short})
        self._programs = {form for task in tasks for form in _programs(task)}

    def finds(self, task: Task) -> bool:
        """Whether ``task`` overlaps with an evaluation task."""
        words = tuple(_words(task.prompt))
        if not self._grams.isdisjoint(_ngrams(words, _NGRAM)):
            return True
        if any(not self._short.isdisjoint(_ngrams(words, n)) for n in self._lengths):
            return True
        return not self._programs.isdisjoint(_programs(task))


def near_duplicates(prompt: str, others: Iterable[str]) -> bool:
    """Whether one of ``others`` is ``prompt`` with little changed but no number."""
    numbers, grams = _NUMBER.findall(prompt), _trigrams(prompt)
    for other in others:
        if _NUMBER.findall(other) == numbers:
            theirs = _trigrams(other)
            if len(grams & theirs) >= _NEAR * len(grams | theirs):
                return True
    return False


def _words(prompt: str) -> list[str]:
    for course in COURSES.values():
        prompt = prompt.replace(course.instruction, "")
    return _WORD.findall(prompt.casefold())


def _ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _trigrams(prompt: str) -> set[tuple[str, ...]]:
    words = _words(prompt)
    return _ngrams(words, 3) or {tuple(words)}


def _programs(task: Task) -> set[str]:
    """The functions and classes of a code task's solution, each without its names."""
    if task.domain != "code":
        return set()
    blocks = _FENCE.findall(task.solution)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes are the author's, not ours
            tree = ast.parse(blocks[-1] if blocks else task.solution)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()  # no program; admission refuses it for that
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {_nameless(node) for node in tree.body if isinstance(node, kinds)}


def _nameless(node: ast.AST) -> str:
    """The code under ``node`` with its own names numbered in the order of their appearance.

    Names that it does not bind itself (``len``, ``sorted``, a module's) stay: they do the work.
    """
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    bound |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bound |= {n.name for n in ast.walk(node) if isinstance(n, kinds)}
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        return numbers.setdefault(name, f"_{len(numbers)}") if name in bound else name

    for item in ast.walk(node):
        if isinstance(item, ast.Name):
            item.id = number(item.id)
        elif isinstance(item, ast.arg):
            item.arg, item.annotation = number(item.arg), None
        elif isinstance(item, kinds):
            item.name = number(item.name)
            if ast.get_docstring(item) is not None:
                item.body = item.body[1:] or [ast.Pass()]
            if not isinstance(item, ast.ClassDef):
                item.returns = None
    return ast.dump(node)
