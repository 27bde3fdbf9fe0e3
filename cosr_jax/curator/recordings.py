"""Outcomes of calls on disk: a cache, and recordings that replay a run without its servers.

One JSON file per outcome, ``folder/<first two digits>/<key>-<n>.json``, with the SHA-256 of its
payload inside.  ``n`` counts the failures recorded for the same question before it: a question
that failed once and was answered when asked again replays in that order.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.calls import (
    CallError,
    Complaint,
    Reply,
    Request,
    outcome_from_dict,
    outcome_to_dict,
)
from cosr_jax.types import UserError

_log = logging.getLogger(__name__)

_FORMAT = 1


class Recordings:
    """A folder of outcomes.

    Args:
      folder: made when the first outcome is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.damaged = 0  # entries found damaged

    def path(self, key: str, n: int) -> Path:
        """Where the outcome of ``key`` after ``n`` failures lies."""
        return self.folder / key[:2] / f"{key}-{n}.json"

    def read(self, key: str, n: int) -> dict[str, Any] | None:
        """The outcome's payload, or None where there is none.

        A damaged entry counts as none: it is dropped, and a fresh one takes its place.
        """
        path = self.path(key, n)
        try:
            return self._payload(path)
        except ValueError:
            self.damaged += 1
            path.unlink(missing_ok=True)
            return None

    def replay(self, key: str, n: int, role: str) -> dict[str, Any]:
        """The outcome's payload.

        Raises:
          UserError: there is none, or it is damaged.
        """
        path = self.path(key, n)
        try:
            payload = self._payload(path)
        except ValueError as error:
            raise UserError(
                f"the recording {path} is damaged ({error})",
                "restore it, or record the run again with config.curator.llm.mode=record",
            ) from error
        if payload is None:
            raise UserError(
                f"{self.folder} has no recording of this question of the {role} ({path.name})",
                "replay needs the config, the seed and the code of the recorded run; otherwise "
                "record again with config.curator.llm.mode=record",
            )
        return payload

    def write(self, key: str, n: int, payload: Mapping[str, Any]) -> None:
        """Writes one outcome so that a reader sees all of it or nothing.

        Raises:
          OSError: the disk does not take it.
        """
        path = self.path(key, n)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"format": _FORMAT, "sha256": _digest(payload), "payload": payload}
        # ASCII: no byte of it depends on the machine's encoding.
        text = json.dumps(entry, indent=1, sort_keys=True) + "\n"
        with tempfile.NamedTemporaryFile(
            "w", encoding="ascii", dir=path.parent, prefix=".", suffix=".part", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _payload(self, path: Path) -> dict[str, Any] | None:
        try:
            entry = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
            raise ValueError("not an entry of this format")
        if entry.get("sha256") != _digest(entry.get("payload")):
            raise ValueError("its content does not match its checksum")
        return entry["payload"]


@dataclasses.dataclass(frozen=True)
class Kept:
    """An outcome from disk."""

    outcome: Reply | CallError
    is_charged: bool  # it costs this run what it cost when it was new


class Archive:
    """What the client keeps of its calls: nothing, good answers, or everything, by ``mode``.

    In the modes record and replay an outcome costs what it cost, the first time that a run meets
    it, so that a run takes the same turns when it is replayed, or resumed.  What a cache holds is
    free.

    Raises:
      UserError: the mode needs a folder, and there is none.
    """

    def __init__(self, config: CuratorLlmConfig):
        if config.mode != "live" and not config.folder:
            raise UserError(
                f"config.curator.llm.folder: '' with mode {config.mode!r}",
                "name the folder of the recorded answers",
            )
        self.mode = config.mode
        self.unwritten = 0  # answers that the disk did not take
        self._recordings = Recordings(Path(config.folder))
        self._failures: collections.Counter[str] = collections.Counter()  # met, by key
        self._answered: set[str] = set()  # keys whose answer was met

    @property
    def damaged(self) -> int:
        """Entries that were found damaged."""
        return self._recordings.damaged

    def find(self, key: str, role: str) -> Kept | None:
        """The outcome of a question on disk, if the mode wants it.

        Raises:
          UserError: a replay has no recording of it, or a damaged one.
        """
        if self.mode == "live":
            return None
        n = self._failures[key]
        payload: dict[str, Any] | None
        if self.mode == "replay":
            payload = self._recordings.replay(key, n, role)
        else:
            payload = self._recordings.read(key, n)
        if payload is None:
            return None
        outcome = outcome_from_dict(payload)
        if isinstance(outcome, Reply):
            outcome = dataclasses.replace(outcome, from_cache=True)
        is_charged = self.mode != "cache" and key not in self._answered
        self._met(key, outcome)
        return Kept(outcome, is_charged)

    def rejected(self, kept: Kept, complaint: Complaint) -> Kept | None:
        """What an answer is worth that the parser no longer takes: in a cache, nothing."""
        if self.mode == "cache":
            return None
        error = CallError(complaint.kind, "rejected", complaint.detail, spent=kept.outcome.spent)
        return dataclasses.replace(kept, outcome=error)

    def keep(self, key: str, request: Request, outcome: Reply | CallError) -> None:
        """Takes the outcome of a call.

        Raises:
          UserError: a recording cannot be written.
        """
        is_error = isinstance(outcome, CallError)
        if self.mode == "live" or (self.mode == "cache" and is_error):
            return
        payload = {"request": request.to_dict(), **outcome_to_dict(outcome)}
        try:
            self._recordings.write(key, self._failures[key], payload)
        except OSError as error:
            if self.mode == "record":
                raise UserError(
                    f"config.curator.llm.folder: {self._recordings.folder}: {error}",
                    "make room, or record to another folder",
                ) from error
            self.unwritten += 1
            _log.warning("an answer could not be cached: %s", error)
        self._met(key, outcome)

    def _met(self, key: str, outcome: Reply | CallError) -> None:
        if isinstance(outcome, CallError):
            self._failures[key] += 1
        else:
            self._answered.add(key)

    def state_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {"failures": dict(self._failures), "answered": sorted(self._answered)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``'s values."""
        self._failures = collections.Counter(state["failures"])
        self._answered = set(state["answered"])


def _digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
