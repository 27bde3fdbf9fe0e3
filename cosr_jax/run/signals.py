"""SIGTERM and SIGINT as a request that the training loop answers at a step boundary."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns the first SIGTERM or SIGINT into a flag.

    A second SIGINT raises KeyboardInterrupt, for people in a hurry.  Handlers belong to the main
    thread, so that is where it must be entered; the previous ones return at exit.

    When ``jax.distributed`` is initialised it already listens for SIGTERM, and ``poll`` asks it
    (``jax.experimental.multihost_utils.reached_preemption_sync_point``), so that all processes
    stop at the same step.  No handler is set then: SIGINT stays a KeyboardInterrupt, as a process
    that alone left the loop would keep the others waiting for ever.
    """

    def __init__(self) -> None:
        self._signal_name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in () if _is_distributed() else _WATCHED:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            # None: the previous handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @property
    def requested(self) -> str:
        """Name of the signal that asked to stop, e.g. "SIGTERM"; "" while none did."""
        return self._signal_name

    def poll(self, step: int) -> str:
        """``requested``, agreed upon by all processes of a distributed run.

        Args:
          step: the step about to begin; every process calls this once with every step.
        """
        if not self._signal_name and _is_distributed():
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self._signal_name = "SIGTERM"
        return self._signal_name

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal_name == "SIGINT":
            raise KeyboardInterrupt
        self._signal_name = signal.Signals(number).name


def _is_distributed() -> bool:
    # Whoever initialised jax.distributed has imported jax; nobody else should have to.
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
