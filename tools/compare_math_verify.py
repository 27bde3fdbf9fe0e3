"""Compares our maths rules with Math-Verify on the corpus; writes docs/verifiers_maths.md.

    python tools/compare_math_verify.py [--check]

Every case on which the two differ names the reason in its field ``math_verify_differs``.  With
--check nothing is written: the exit code says whether a difference is unexplained.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from typing import Any

from math_verify import parse, verify

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "verifiers" / "corpus" / "math_pairs.jsonl"
PAGE = ROOT / "docs" / "verifiers_maths.md"
_SECONDS = 2

# Reason -> (which of the two passes the answer, why).
REASONS = {
    "rounding": ("Math-Verify", "it rounds; we compare exactly"),
    "calculations": (
        "Math-Verify",
        "it evaluates what is left to calculate; to us that is no answer",
    ),
    "order and brackets": ("Math-Verify", "it takes lists, tuples and sets for one another"),
    "units ignored": ("Math-Verify", "it drops units, also wrong ones"),
    "percent": ("Math-Verify", "to it 25 is 25% and 25% is 25; to us 25% is 0.25"),
    "bases ignored": ("Math-Verify", "it drops the base of a numeral"),
    "ratios": ("Math-Verify", "it divides: 3:45 becomes 1/15, like 1:15"),
    "chains": ("Math-Verify", "it reads the last side of 3=4"),
    "case": ("Math-Verify", "it compares letters without case"),
    "partial reading": ("Math-Verify", "it passes over what it cannot read, such as \\neq"),
    "solved equation": ("Math-Verify", "where the gold is solved for y, we want it solved"),
    "notation": (
        "we",
        "it does not read the notation: thin spaces, repeating decimals, full stops",
    ),
    "imaginary unit": ("we", "to it i is a variable"),
    "sets of reals": ("we", "it does not see that x > 3 is (3, \\infty)"),
    "unit names": ("we", "it knows no synonyms of units, and no unit that was left out"),
    "written values": (
        "we",
        "number words, choices with their values, times, ratios, bases in words",
    ),
    "collections": ("we", "\\pm, other brackets, names of the empty set, rows in brackets"),
}


def agrees(given: str, gold: str) -> bool:
    """Math-Verify's verdict, with the answer in a box as a student would give it."""
    answer = parse(f"$\\boxed{{{given}}}$", parsing_timeout=_SECONDS)
    return bool(
        verify(parse(f"${gold}$", parsing_timeout=_SECONDS), answer, timeout_seconds=_SECONDS)
    )


def main() -> int:
    """Runs the comparison; 1 if a difference is unexplained or an explanation is out of date."""
    logging.disable(logging.CRITICAL)
    cases = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    differing: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    wrong = []
    for case in cases:
        reason = case.get("math_verify_differs", "")
        passes = agrees(case["given"], case["gold"])
        if (passes != case["agree"]) != bool(reason):
            wrong.append(case)
        elif reason:
            assert (REASONS[reason][0] == "we") == case["agree"], case
            differing[reason].append(case)
    for case in wrong:
        print(f"explained wrongly or not at all: {case}")
    if "--check" not in sys.argv and not wrong:
        PAGE.write_text(_page(cases, differing), encoding="utf-8")
        print(f"wrote {PAGE}")
    return int(bool(wrong))


def _page(cases: list[dict[str, Any]], differing: dict[str, list[dict[str, Any]]]) -> str:
    count = sum(map(len, differing.values()))
    version = importlib.metadata.version("math-verify")
    right = sum(case["agree"] for case in cases)
    lines = [
        "# Maths: our rules and Math-Verify's",
        "",
        "The rules stand at the top of `cosr_jax/verifiers/math_answer.py`. The corpus,",
        f"`tests/verifiers/corpus/math_pairs.jsonl`, has {len(cases)} pairs of answer and gold:",
        f"{right} that state the same and {len(cases) - right} that do not, among them traps,",
        "injections and expensive inputs; our verdict is the expected one on all of them (a test).",
        f"Math-Verify {version} agrees on {len(cases) - count}"
        f" ({1 - count / len(cases):.0%}). Each of the {count} differences is explained:",
        "",
        "| passes | pairs | why | for example (answer; gold) |",
        "| --- | --- | --- | --- |",
    ]
    for reason, (who, why) in REASONS.items():
        found = differing[reason]
        if not found:
            continue
        shown = min(found, key=lambda case: len(case["given"] + case["gold"]))
        example = f"`{shown['given']}`; `{shown['gold']}`".replace("|", "\\|")
        lines.append(f"| {who} | {len(found)} | {why} | {example} |")
    lines += ["", "Written by `python tools/compare_math_verify.py`.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
