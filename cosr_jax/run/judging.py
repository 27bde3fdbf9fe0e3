"""Judging while the student still writes.

The answers to a task go to the verifier as soon as the last of them is known, and the device
decodes on meanwhile.  Verdicts come back in the tasks' order whatever the order in which they were
reached, so that nothing that follows can tell this from judging afterwards.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from cosr_jax.protocols import Verifier
from cosr_jax.types import Completion, Finished, Task, Verdict

#: Calls of the verifier under way at once.  Their threads do nothing but wait: the verifier has
#: bounds of its own.
_CALLS = 64

#: A domain with fewer ERROR verdicts does not stop the run: their share would say nothing.
_FEW_ERRORS = 3


class JudgeClock:
    """How long judging took since the start, and how much of it somebody waited for."""

    def __init__(self) -> None:
        self.busy_s = 0.0  # that at least one case was being judged
        self.waited_s = 0.0  # that all else was done and verdicts were missing
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """The time inside is spent judging; may be entered by many threads at once."""
        with self._lock:
            if self._under_way == 0:
                self._since = time.monotonic()
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if self._under_way == 0:
                    self.busy_s += time.monotonic() - self._since

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is spent waiting for verdicts; for one thread."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began


class Judging:
    """The verdicts about one call of a rollout engine.  Use as a context manager.

    Leaving it early, by an exception, drops what the verifier has not been asked yet.

    Args:
      verifier: asked by several threads, once for each task, about all answers to it.
      tasks: those of the call's prompts.
      size: answers to each.
      clock: of what is spent here.
    """

    def __init__(self, verifier: Verifier, tasks: Sequence[Task], size: int, clock: JudgeClock):
        self._verifier, self._tasks, self._size, self._clock = verifier, tasks, size, clock
        self._known: list[dict[int, Completion]] = [{} for _ in tasks]  # by sample
        self._calls: dict[int, concurrent.futures.Future[list[Verdict]]] = {}  # by task
        self._threads = concurrent.futures.ThreadPoolExecutor(_CALLS, "judging")

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A case under way ends with its limits or its verifier; a failure does not wait for it.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def note(self, finished: Finished) -> bool:
        """``on_finished`` of ``RolloutEngine.generate``; no group is cut short."""
        known = self._known[finished.prompt]
        known[finished.sample] = finished.completion
        if len(known) == self._size:
            self._ask(finished.prompt, [known[sample] for sample in range(self._size)])
        return False

    def verdicts(self, groups: Sequence[Sequence[Completion]]) -> list[list[Verdict]]:
        """The verdicts, in the order of tasks and answers.

        Args:
          groups: all answers to each task, as ``generate`` returned them.

        Raises:
          ValueError: the verifier gave more or fewer verdicts than it was asked for.
          Exception: what the verifier raised about the first task, in their order, that failed.
        """
        for place, group in enumerate(groups):
            if place not in self._calls:
                self._ask(place, group)
        with self._clock.waiting():
            return [self._calls[place].result() for place in range(len(groups))]

    def _ask(self, place: int, group: Sequence[Completion]) -> None:
        self._calls[place] = self._threads.submit(self._judge, self._tasks[place], group)

    def _judge(self, task: Task, group: Sequence[Completion]) -> list[Verdict]:
        with self._clock.judging():
            verdicts = self._verifier.judge([(task, completion) for completion in group])
        if len(verdicts) != len(group):
            raise ValueError(f"{len(verdicts)} verdicts for {len(group)} completions")
        return verdicts


def too_few_verdicts(counts: Mapping[str, Sequence[int]], what: str, limit: float) -> str:
    """Why too many verdicts are missing, of all or of one domain, to go on; "" if they are not.

    Args:
      counts: by domain, how many verdicts there should be and how many are missing.
      what: was judged, for the reason.
      limit: the largest share, in [0, 1], that may be missing (``verifier.max_error_rate``).
    """
    wanted, missing = (sum(count[i] for count in counts.values()) for i in (0, 1))
    shares = {what: missing / max(1, wanted)}
    for domain, (wanted, missing) in counts.items():
        if missing >= _FEW_ERRORS:
            shares[f"{what} in {domain}"] = missing / wanted
    for name, share in shares.items():
        if share > limit:
            return (
                f"the verifier could not judge {share:.0%} of the {name} "
                f"(config.verifier.max_error_rate is {limit:.0%})"
            )
    return ""
