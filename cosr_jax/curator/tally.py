"""What became of the curator's calls: counters for TensorBoard, a record of each for the log."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosr_jax.curator.calls import CallError, Reply, Request

_log = logging.getLogger(__name__)


class Tally:
    """Counts since the run began, by slashed names.

      attempts, attempts_failed/REASON          HTTP requests
      calls/ROLE, failed/REASON, kept           questions; answered from disk
      lengthened, rejected/KIND, shortened      asked again: cut, unusable, prompt too long
      downgraded/PARAMETER, failover/ENDPOINT, breaker_opened/ENDPOINT
      tokens/ROLE/{prompt,completion,reasoning}, latency_s/ROLE, usage_estimated

    Args:
      on_call: called with one JSON-serialisable record about each finished call.
    """

    def __init__(self, on_call: Callable[[Mapping[str, Any]], None] | None = None):
        self.counts: collections.Counter[str] = collections.Counter()
        self._on_call = on_call

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        self.counts[name] += amount  # type: ignore[assignment]

    def finish(
        self,
        key: str,
        request: Request,
        outcome: Reply | CallError,
        trail: Sequence[str],
        is_charged: bool,
    ) -> None:
        """Takes a finished call.

        Args:
          key: the request's.
          request: what was asked.
          outcome: what came of it.
          trail: what happened on the way, in words.
          is_charged: whether its tokens count; those of an answer met before do not.
        """
        role = request.role
        self.count(f"calls/{role}")
        if isinstance(outcome, CallError):
            self.count(f"failed/{outcome.reason}")
            _log.warning("%s: %s after %s", role, outcome.reason, trail)
        else:
            self.count("kept", outcome.from_cache)
        if is_charged:
            self.count(f"tokens/{role}/prompt", outcome.spent.prompt_tokens)
            self.count(f"tokens/{role}/completion", outcome.spent.completion_tokens)
            # Such fractions add up to the same in whatever order calls finish.
            self.count(f"latency_s/{role}", round(outcome.latency_s * 2**20) / 2**20)
        if is_charged and isinstance(outcome, Reply):
            self.count(f"tokens/{role}/reasoning", outcome.usage.reasoning_tokens)
            self.count("usage_estimated", outcome.usage.is_estimated)
        if self._on_call is not None:
            record = outcome.to_dict()
            for text in ("content", "reasoning", "refusal"):
                record.pop(text, None)
            asked = {"role": role, "key": key, "schema": request.schema_hash}
            dollars = outcome.spent.dollars
            self._on_call({**asked, **record, "dollars": dollars, "trail": list(trail)})
