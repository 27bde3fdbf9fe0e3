"""Writes the cost table of docs/curator.md from the recorded calls of tests/run/recordings.

python tools/make_cost_table.py          # write
python tools/make_cost_table.py --check  # exit with 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.prompts import _ANSWER_TOKENS

ROOT = Path(__file__).parent.parent
PAGE, RECORDINGS = ROOT / "docs" / "curator.md", ROOT / "tests" / "run" / "recordings"
BEGIN, END = "<!-- costs: begin -->\n", "<!-- costs: end -->\n"

#: Dollars per million tokens, in and out, and where it says so.
PRICES = {
    "gpt-oss-20b": (0.12, 0.48, "therouter.ai/models/openai--gpt-oss-20b"),
    "gpt-oss-120b": (0.35, 0.75, "inference-docs.cerebras.ai/models/openai-oss"),
}


def render() -> str:
    """The table as Markdown."""
    spent: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(RECORDINGS.rglob("*.json")):
        payload = json.loads(path.read_text(encoding="ascii"))["payload"]
        usage = payload["reply"]["usage"]
        tokens = (usage["prompt_tokens"], usage["completion_tokens"])
        spent.setdefault(payload["request"]["role"], []).append(tokens)
    head = ["call", "calls", "tokens in", "tokens out", *PRICES]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for role in sorted(spent):
        calls = len(spent[role])
        tokens_in, tokens_out = (round(sum(t[i] for t in spent[role]) / calls) for i in (0, 1))
        rows.append(_row(f"{role}, recorded", calls, tokens_in, tokens_out))
    longest = CuratorLlmConfig().prompt_tokens
    for role in sorted(spent):
        rows.append(_row(f"{role}, at most", 1, longest, _ANSWER_TOKENS[role]))
    sources = "; ".join(
        f"{name}: ${i:g} in, ${o:g} out ({s})" for name, (i, o, s) in PRICES.items()
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nList prices per million tokens, as an example: {sources}.\n"


def _row(name: str, calls: int, tokens_in: int, tokens_out: int) -> list[str]:
    costs = [(tokens_in * i + tokens_out * o) / 1e6 for i, o, _ in PRICES.values()]
    return [name, str(calls), str(tokens_in), str(tokens_out), *(f"${cost:.4f}" for cost in costs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if check:
        if new == page:
            return 0
        print(f"{PAGE.name} is out of date; run python tools/make_cost_table.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
