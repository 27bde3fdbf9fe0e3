"""Outcomes of calls on disk: a cache, and recordings that replay a run without its servers.

One JSON file per outcome, ``folder/<first two digits>/<key>-<n>.json``, with the SHA-256 of its
payload inside.  ``n`` counts the failures recorded for the same question before it: a question
that failed once and was answered when asked again replays in that order.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosr_jax.types import UserError

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


def _digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
