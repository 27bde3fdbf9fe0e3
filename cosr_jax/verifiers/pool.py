"""Judges completions: extraction and exact comparison here, symbolic comparison in workers.

Extraction and exact comparison are bounded work of microseconds.  ``dispatch`` says when a
symbolic comparison that does not come back is the student's failure, and when it is an ERROR.
"""

from __future__ import annotations

import collections
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from cosr_jax.config import VerifierConfig
from cosr_jax.types import Completion, Outcome, Task, UserError, Verdict
from cosr_jax.verifiers.dispatch import Comparison, Dispatcher
from cosr_jax.verifiers.extraction import METHODS, Extraction, extract_answer
from cosr_jax.verifiers.math_answer import answers_agree, restates

WORKER_COMMAND = (sys.executable, "-m", "cosr_jax.verifiers.worker")

_LATENCIES_KEPT = 10_000


class VerifierPool:
    """Implements ``protocols.Verifier`` for maths.  Use as a context manager, or ``close`` it.

    Args:
      config: workers, wall clock and accepted forms.
      worker_command: what to run as a worker; tests put misbehaving ones here.

    Raises:
      UserError: ``config.accept`` is empty or names an unknown form.
    """

    def __init__(self, config: VerifierConfig, worker_command: Sequence[str] = WORKER_COMMAND):
        for form in config.accept:
            if form not in METHODS:
                raise UserError(
                    f"config.verifier.accept: {form!r} is no form of an answer",
                    f"choose among {', '.join(METHODS)}",
                )
        if not config.accept:
            raise UserError(
                "config.verifier.accept: () accepts no answer", f"choose among {', '.join(METHODS)}"
            )
        self._config = config
        self._dispatcher = Dispatcher(worker_command, config.workers, config.wall_s)
        self._lock = threading.Lock()
        self._is_closed = False
        self._categories: collections.Counter[str] = collections.Counter()
        self._latencies: collections.deque[float] = collections.deque(maxlen=_LATENCIES_KEPT)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        """One verdict for each case, in order.

        A verdict passes if the value is right and its form is in ``config.accept``; a right value
        in another form has ``value_correct`` but fails with "no_answer" ("truncated" if the length
        limit cut the completion).

        Raises:
          UserError: a task is not of the maths domain.
          RuntimeError: the pool is closed.
        """
        for task, _ in cases:
            if task.domain != "math":
                raise UserError(
                    f"task {task.key!r} has domain {task.domain!r}, which this verifier cannot "
                    "judge",
                    "leave it out of the run's tasks",
                )
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the verifier pool is closed")
            return self._judge(cases)

    def stats(self) -> dict[str, Any]:
        """Since the start: verdicts by category ("pass", "error", or a failure category), retries,
        errors, restarts of workers, and median and 95th percentile of the latency in seconds.
        """
        latencies = sorted(self._latencies)
        return {
            "verdicts": dict(self._categories),
            "retries": self._dispatcher.retries,
            "errors": self._categories["error"],
            "restarts": self._dispatcher.restarts,
            "latency_p50_s": statistics.median(latencies) if latencies else 0.0,
            "latency_p95_s": latencies[int(0.95 * (len(latencies) - 1))] if latencies else 0.0,
        }

    def close(self) -> None:
        """Kills the workers; the pool judges no more."""
        with self._lock:
            self._is_closed = True
            self._dispatcher.close()

    def _judge(self, cases: Sequence[tuple[Task, Completion]]) -> list[Verdict]:
        extractions: list[Extraction] = []
        comparisons: dict[int, Comparison] = {}
        undecided: list[int] = []
        for index, (task, completion) in enumerate(cases):
            start = time.perf_counter()
            found = extract_answer(completion.text, completion.finish_reason)
            extractions.append(found)
            agree, detail = False, ""
            if not found.category:
                if restates(task.prompt, found.answer, task.answer):
                    detail = "restates the question"
                else:
                    exact = answers_agree(found.answer, task.answer)
                    if exact is None:
                        undecided.append(index)
                        continue
                    agree = exact
            seconds = time.perf_counter() - start
            comparisons[index] = Comparison(agree, detail=detail, seconds=seconds)
        if undecided:
            pairs = [(extractions[i].answer, cases[i][0].answer) for i in undecided]
            comparisons.update(zip(undecided, self._dispatcher.compare(pairs), strict=True))
        verdicts = [
            self._verdict(completion, extractions[i], comparisons[i])
            for i, (_, completion) in enumerate(cases)
        ]
        for verdict in verdicts:
            is_error = verdict.outcome is Outcome.ERROR
            self._categories["error" if is_error else verdict.category or "pass"] += 1
            self._latencies.append(verdict.seconds)
        return verdicts

    def _verdict(
        self, completion: Completion, found: Extraction, comparison: Comparison
    ) -> Verdict:
        outcome, category, detail = Outcome.FAIL, "", comparison.detail
        no_form = "truncated" if completion.finish_reason == "length" else "no_answer"
        is_accepted = found.method in self._config.accept
        if found.category:
            category = found.category
        elif comparison.limit:
            category = comparison.limit if is_accepted else no_form
        elif comparison.agree is None:
            outcome = Outcome.ERROR
        elif comparison.agree and is_accepted:
            outcome = Outcome.PASS
        elif is_accepted:
            category = "wrong_answer"
        else:
            category = no_form
            value = "right" if comparison.agree else "wrong"
            detail = f"{value} value in the form {found.method!r}, which is not accepted"
        return Verdict(
            outcome=outcome,
            reward=float(outcome is Outcome.PASS),
            category=category,
            answer=found.answer,
            method=found.method,
            value_correct=bool(comparison.agree),
            seconds=comparison.seconds,
            detail=detail,
        )
