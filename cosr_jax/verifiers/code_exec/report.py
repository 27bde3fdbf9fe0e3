"""What the parent and the tests' process tell each other: the tests, and how they went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from cosr_jax.verifiers.code_exec import values  # noqa: F401  (fills the tables of ``wire``)
from cosr_jax.verifiers.code_exec.wire import Link, Writer

_MAX_DETAIL = 300
#: For plain values, which need no link.
NO_LINK = cast(Link, None)


@dataclasses.dataclass
class Report:
    """How the tests went.

    Attributes:
      passed: test statements that held, of those that use the program.
      total: test statements that use the program, or failed.
      category: of the first failure; "" if there was none.
      detail: of the first failure, for people.
      is_lost: the student's side ended early; how its process ended says why.
      is_final: nothing more will come.
      trouble: why the tests themselves cannot be run; "" if they can.
    """

    passed: int = 0
    total: int = 0
    category: str = ""
    detail: str = ""
    is_lost: bool = False
    is_final: bool = False
    trouble: str = ""

    def to_line(self) -> bytes:
        """One line: the fields, separated by tabs, which no text of it contains."""
        return "\t".join(str(value) for value in vars(self).values()).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Report:
        """The inverse of ``to_line``, without the end of the line.

        Raises:
          ValueError: it is no report.
        """
        report = cls()
        for (name, default), text in zip(
            vars(report).items(), line.decode().split("\t"), strict=True
        ):
            if type(default) is bool and text not in ("True", "False"):
                raise ValueError("not a report")
            value = text == "True" if type(default) is bool else type(default)(text)
            setattr(report, name, value)
        return report


def request(tests: Sequence[str], entry_point: str, run_all: bool) -> bytes:
    """What ``examiner.main`` reads first: the statements, and whether to go on behind a failure."""
    writer = Writer(NO_LINK)
    writer.value((tuple(tests), entry_point, run_all))
    return len(writer.data).to_bytes(4, "little") + writer.data


def clip(text: str) -> str:
    """Fit for a log: short, printable, one line."""
    clean = text[: 4 * _MAX_DETAIL].encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in clean).split())[:_MAX_DETAIL]
