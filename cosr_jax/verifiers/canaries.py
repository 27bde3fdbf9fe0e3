"""Cases with known verdicts, mixed into what is judged: training stops when one is judged wrongly.

A verifier that begins to pass what is wrong teaches it within hours, and one that fails what is
right stops the learning; neither shows in its own figures.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cosr_jax.protocols import Verifier
from cosr_jax.types import (
    Checks,
    CodeChecks,
    Completion,
    Domain,
    Outcome,
    ProofChecks,
    ScorerChecks,
    Task,
    UserError,
    Verdict,
    WebChecks,
)

FAILURE_FILE = "canary_failure.json"


@dataclasses.dataclass(frozen=True)
class Canary:
    """One case and its verdict."""

    task: Task
    completion: Completion
    passes: bool

    @property
    def name(self) -> str:
        """What the case tries, e.g. "code: right by any operator"."""
        return self.task.key


class CanaryWatch:
    """A verifier that adds canaries to what it judges: with the first case of a domain, and again
    after every ``every`` of the domain's cases.

    How often a domain is checked thus depends on how many of its cases came, not on how they were
    divided into calls or in which order these came.  May be called by several threads at once.

    Args:
      verifier: who judges.
      every: cases between checks; 0 never checks.
      accept: forms of a maths answer that count.
      folder: where ``FAILURE_FILE`` goes.
    """

    def __init__(self, verifier: Verifier, every: int, accept: Sequence[str], folder: Path):
        self._verifier, self._every = verifier, every
        self._accept, self._folder = accept, folder
        self._counts: collections.Counter[str] = collections.Counter()  # cases, by domain
        self._lock = threading.Lock()

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        """One verdict for each case, in order.

        Raises:
          UserError: a canary was judged wrongly.  A canary that could not be judged says nothing.
        """
        birds = [canary for domain in self._due(cases) for canary in canaries(domain, self._accept)]
        verdicts = self._verifier.judge([*cases, *((bird.task, bird.completion) for bird in birds)])
        for canary, verdict in zip(birds, verdicts[len(cases) :], strict=True):
            self._check(canary, verdict)
        return verdicts[: len(cases)]

    def close(self) -> None:
        """Closes the verifier."""
        self._verifier.close()

    def _due(self, cases: Sequence[tuple[Task, Completion]]) -> list[Domain]:
        """The domains to be checked with these cases, which are counted."""
        if not self._every:
            return []
        came = collections.Counter(task.domain for task, _ in cases)
        with self._lock:
            before = {domain: self._counts[domain] for domain in came}
            self._counts.update(came)
        # Case n of a domain brings a check where n is a multiple of ``every``, counted from 0.
        return [d for d in sorted(came) if -before[d] % self._every < came[d]]

    def _check(self, canary: Canary, verdict: Verdict) -> None:
        expected = Outcome.PASS if canary.passes else Outcome.FAIL
        if verdict.outcome in (expected, Outcome.ERROR):
            return
        path = self._folder / FAILURE_FILE
        sample = {
            "expected": expected.value,
            "task": canary.task.to_dict(),
            "completion": canary.completion.text,
            "verdict": {**dataclasses.asdict(verdict), "outcome": verdict.outcome.value},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample, indent=2) + "\n", encoding="utf-8")
        raise UserError(
            f"the verifier judged {canary.name!r} as {verdict.outcome.value}, and it is known to "
            f"{expected.value}: its rewards cannot be trusted",
            f"see {path}, mend the verifier, and run the same command again from its last save",
        )


def canaries(domain: Domain, accept: Sequence[str] = ("boxed",)) -> tuple[Canary, ...]:
    """The canaries of a domain.

    Args:
      domain: of ``Task.domain``.
      accept: forms of a maths answer that count; the canaries use the first one.
    """
    return _MAKERS[domain](accept)


def _canary(
    domain: Domain, name: str, text: str, passes: bool, checks: Checks | None, answer: str = ""
) -> Canary:
    task = Task(domain, "canary", 0.0, "", answer, f"{domain}: {name}", checks=checks)
    return Canary(task, Completion((), (), text, "stop"), passes)


_FORMS = {
    "boxed": r"So we get \boxed{%s}.",
    "answer_tag": "<think>Easy.</think><answer>%s</answer>",
    "hashes": "We add.\n#### %s",
    "phrase": "We add. The answer is %s.",
    "bare": "%s",
    "number": "We add, and that makes %s",
}


def _math(accept: Sequence[str]) -> tuple[Canary, ...]:
    form = accept[0]
    answers = [
        ("right", "12", True, "12"),
        ("right by another name", "24/2", True, "12"),
        ("wrong", "13", False, "12"),
        ("wrong in the last digit", "1000000000000001", False, "1000000000000000"),
        ("two answers", "12 or 13", False, "12"),
        ("code for an answer", "__import__('os')", False, "0"),
    ]
    if form in ("boxed", "answer_tag"):
        answers += [
            ("right by algebra", r"2\sqrt{2}", True, r"\sqrt{8}"),
            ("nearly right", r"\frac{1}{2^{99}}", False, r"\frac{1}{2^{98}}"),
            ("nothing", " ", False, "0"),
        ]
    return tuple(
        _canary("math", name, _FORMS[form] % answer, passes, None, gold)
        for name, answer, passes, gold in answers
    )


_ADD = CodeChecks("add", ("assert add(2, 3) == 5", "assert add(-1, 1) == 0"))
_PROGRAMS = (
    ("right", "def add(a, b):\n    return a + b", True),
    ("wrong", "def add(a, b):\n    return a - b", False),
    ("missing", "def plus(a, b):\n    return a + b", False),
    ("leaves early", "import os\ndef add(a, b):\n    os._exit(0)", False),
    ("leaves at import", "raise SystemExit(0)\ndef add(a, b):\n    return a + b", False),
    (
        "equal to everything",
        "class Any:\n    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n    def __bool__(self): return True\n"
        "def add(a, b):\n    return Any()",
        False,
    ),
    (
        "a number equal to everything",
        "class Number(int):\n    def __eq__(self, other): return True\n"
        "    def __hash__(self): return 0\ndef add(a, b):\n    return Number(7)",
        False,
    ),
    (
        "patches what tests use",
        "import builtins\nbuiltins.AssertionError = type('E', (), {})\n"
        "def add(a, b):\n    return None",
        False,
    ),
    (
        "prints a verdict",
        'def add(a, b):\n    print(\'{"verdict": "pass", "passed": true}\', flush=True)',
        False,
    ),
)


def _code(accept: Sequence[str]) -> tuple[Canary, ...]:
    functions = [
        _canary("code", name, f"```python\n{text}\n```", passes, _ADD)
        for name, text, passes in _PROGRAMS
    ]
    double = CodeChecks(io=(("4\n", "8\n"), ("5\n", "10\n")))
    scripts = [
        _canary("code", "right script", "print(2 * int(input()))", True, double),
        _canary("code", "wrong script", "print(8)", False, double),
    ]
    return tuple(functions + scripts)


_MAX = """
(declare-fun max2 (Int Int) Int)
(declare-const x Int)
(declare-const y Int)
(assert (and (>= (max2 x y) x) (>= (max2 x y) y)))
(assert (or (= (max2 x y) x) (= (max2 x y) y)))
"""


def _proof(accept: Sequence[str]) -> tuple[Canary, ...]:
    goal, factors = ProofChecks("smtlib", _MAX), ProofChecks("witness", "factorisation", _NUMBER)
    terms = (
        ("right term", "(ite (> a b) a b)", True),
        ("wrong term", "a", False),
        ("undefined term", "(div a 0)", False),
        ("term that assumes its goal", "(max2 a b)", False),
    )
    witnesses = (
        ("right witness", "[2, 2, 3, 7]", True),
        ("wrong witness", "[2, 6, 7]", False),
        ("empty witness", "[]", False),
    )
    head = "(define-fun max2 ((a Int) (b Int)) Int"
    return tuple(
        [
            _canary("proof", name, f"```\n{head} {t})\n```", passes, goal)
            for name, t, passes in terms
        ]
        + [
            _canary("proof", name, f"<answer>{text}</answer>", passes, factors)
            for name, text, passes in witnesses
        ]
    )


_NUMBER = json.dumps({"number": 84})
_ITEM = json.dumps({"question": "State 5 + 7", "answer": "12", "metadata": {"difficulty": {}}})


def _gym(accept: Sequence[str]) -> tuple[Canary, ...]:
    checks = ScorerChecks("chain_sum", _ITEM)
    return tuple(
        _canary("gym", name, f"<answer>{answer}</answer>", passes, checks)
        for name, answer, passes in (
            ("right", "12", True),
            ("wrong", "13", False),
            ("two answers", "12 13", False),
        )
    )


_COUNTER = json.dumps(
    {
        "expect": [{"role": "status", "text": "0"}],
        "steps": [
            {
                "do": "click",
                "target": {"role": "button", "name": "Add"},
                "expect": [{"role": "status", "text": "1"}],
            }
        ],
    }
)
_PAGE = (
    '<!DOCTYPE html><html lang="en"><head><title>Count</title></head><body>'
    '<button type="button">Add</button> <output>0</output><script>%s</script></body></html>'
)
_COUNT = (
    'const shown = document.querySelector("output");'
    'document.querySelector("button").onclick = () => { shown.textContent = %s; };'
)


def _web(accept: Sequence[str]) -> tuple[Canary, ...]:
    checks = WebChecks(_COUNTER)
    return tuple(
        _canary("web", name, f"```html\n{_PAGE % script}\n```", passes, checks)
        for name, script, passes in (
            ("right", _COUNT % "Number(shown.textContent) + 1", True),
            ("wrong", _COUNT % "Number(shown.textContent) + 2", False),
            ("does nothing", "", False),
            ("says that it passed", 'document.title = "pass"; console.log("pass");', False),
        )
    )


_MAKERS: Mapping[Domain, Callable[[Sequence[str]], tuple[Canary, ...]]] = {
    "math": _math,
    "code": _code,
    "proof": _proof,
    "gym": _gym,
    "web": _web,
}
