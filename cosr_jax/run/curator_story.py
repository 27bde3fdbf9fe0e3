"""The report's pages about a model curator: one chain from failure to gain, and what it took."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.curator.effectiveness import Effect, by_pair, by_strategy

#: Roles with a line of their own in the table of tokens.
_ROLES = ("analyst", "planner", "author", "checker")


def best_chain(chains: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The round on authored tasks that was followed by the largest gain."""
    whole = [c for c in chains if c["authored"] and c["authored"]["kept"] and c["gain"] is not None]
    whole = [c for c in whole if not c["fallback"]]
    return max(whole, key=lambda chain: chain["gain"], default=None)


def chain_parts(chains: Sequence[Mapping[str, Any]], figures: Mapping[str, float]) -> list[str]:
    """Markdown paragraphs: the chain, claims by outcome, rounds without a model, tokens by role."""
    parts = []
    chain = best_chain(chains)
    if chain is not None:
        finding, written = chain["weakness"], chain["authored"]
        failure, first = chain["failure"], written["kept"][0]
        claim = finding["weakness"]
        parts += [
            f"## From a failure to a gain (round {chain['round']})",
            f"The student failed ({failure['category']}) on task {failure['id']}:\n\n"
            f"{quote(failure['prompt'])}\n\nIt answered:\n\n{quote(failure['answer'])}",
            f"The analyst claimed a weakness of kind {claim['kind']} in {claim['skill']}; the "
            f"audit agreed: {finding['reason']}.",
            f"Of {written['written']} tasks written against it ({chain['strategy']}) "
            f"{len(written['kept'])} were kept{_reasons(written['refused'])}. One of them, which "
            f"the student passed in {first['pass_rate']:.0%} of its tries:\n\n"
            f"{quote(first['prompt'])}",
            f"After the round validation accuracy had changed by {chain['gain'] * 100:+.1f} "
            "percentage points.",
        ]
    parts += ["## What the models' advice was worth", _claims(chains)]
    alone = [chain for chain in chains if chain["fallback"]]
    if alone:
        rounds = ", ".join(f"{c['round']} ({c['fallback']})" for c in alone)
        parts.append(f"The procedural curator planned alone in {len(alone)} rounds: {rounds}.")
    parts += effectiveness(chains)
    rows = [
        f"| {role} | {_figure(figures, f'calls/{role}'):.0f} "
        f"| {_figure(figures, f'tokens/{role}/prompt'):.0f} "
        f"| {_figure(figures, f'tokens/{role}/completion'):.0f} |"
        for role in _ROLES
        if _figure(figures, f"calls/{role}")
    ]
    if rows:
        head = "| role | calls | tokens in | tokens out |\n|---|---:|---:|---:|"
        parts.append("\n".join([head, *rows]))
        parts.append(f"All calls together cost ${_figure(figures, 'spent/dollars'):.4f}.")
    return parts


def checklist_parts(figures: Mapping[str, float]) -> list[str]:
    """Markdown paragraphs: what was asked about pages, and what it took."""

    def figure(name: str) -> float:
        return figures.get(f"curator/checklist/{name}", 0.0)

    failed = sum(v for name, v in figures.items() if name.startswith("curator/checklist/failed/"))
    tokens = [figure(f"tokens/checker/{way}") for way in ("prompt", "completion")]
    return [
        "## Opinions on pages",
        f"A model was asked {figure('calls/checker'):.0f} questions of the checklist; "
        f"{failed:.0f} of them stayed without an answer. That took {tokens[0]:.0f} tokens in and "
        f"{tokens[1]:.0f} out; all calls of the run together cost ${figure('spent/dollars'):.4f}.",
    ]


def effectiveness(chains: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each strategy gained by weakness kind, then what each pair of rounds did."""
    single = by_strategy(chains)
    if not single:
        return []
    notes = (
        "Mean gains in points of validation accuracy with Student's 95 % intervals, where there "
        "are two rounds or more; tokens and dollars are of the curator's calls in these rounds."
    )
    parts = [notes, _gains(("strategy", "weakness"), single)]
    pairs = by_pair(chains)
    return [*parts, _gains(("after", "strategy", "weakness"), pairs)] if pairs else parts


def _gains(names: tuple[str, ...], effects: Mapping[Any, Effect]) -> str:
    head = (*names, "rounds", "gain", "tokens", "dollars", "tokens a point", "dollars a point")
    rule = ["---"] * len(names) + ["---:"] * (len(head) - len(names))
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    for key, effect in effects.items():
        gain = f"{effect.gain:+.1f}"
        if effect.interval:
            gain += f" [{effect.interval[0]:+.1f}, {effect.interval[1]:+.1f}]"
        tokens, dollars = effect.per_point(effect.tokens), effect.per_point(effect.dollars)
        row = (
            *key,
            str(len(effect.gains)),
            gain,
            str(effect.tokens),
            f"{effect.dollars:.4f}",
            "-" if tokens is None else f"{tokens:.0f}",
            "-" if dollars is None else f"{dollars:.5f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def quote(text: str) -> str:
    """An indented code block, which no text can close."""
    return "\n".join("    " + line for line in (text.splitlines() or [""]))


def _claims(chains: Sequence[Mapping[str, Any]]) -> str:
    findings = [finding for chain in chains for finding in chain["findings"]]
    accepted = [finding for finding in findings if finding["is_accepted"]]
    kinds = collections.Counter(finding["weakness"]["kind"] for finding in accepted)
    named = f" ({', '.join(f'{kind} {n}' for kind, n in kinds.most_common())})" if kinds else ""
    return (
        f"Of {len(findings)} claimed weaknesses the audit accepted {len(accepted)}{named} and "
        f"rejected {len(findings) - len(accepted)}."
    )


def _reasons(refused: Mapping[str, int]) -> str:
    listed = ", ".join(f"{reason} {count}" for reason, count in refused.items())
    return f" (refused: {listed})" if listed else ""


def _figure(figures: Mapping[str, float], name: str) -> float:
    return figures.get(f"curator/llm/{name}", 0.0)
