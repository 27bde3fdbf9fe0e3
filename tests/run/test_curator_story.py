"""The report's pages about a model curator."""

import pytest

from cosr_jax.curator.effectiveness import by_pair, by_strategy, figures, mean_interval
from cosr_jax.run.curator_story import best_chain, chain_parts, checklist_parts, effectiveness


def finding(kind, is_accepted=True):
    return {
        "weakness": {"skill": "sums", "kind": kind},
        "is_accepted": is_accepted,
        "reason": "9 of 10 fresh answers fail so",
    }


def chain(number, strategy, gain, kind="", fallback="", dollars=0.5, prompt="What is 1 + 1?"):
    weak = finding(kind) if kind else None
    kept = [{"id": "t", "prompt": prompt, "answer": "2", "pass_rate": 0.25}]
    return {
        "round": number,
        "failure": {"id": "f", "prompt": "What is 2 + 2?", "answer": "5", "category": "wrong"},
        "findings": [weak, finding("logic", False)] if weak else [],
        "weakness": weak,
        "authored": {"written": 3, "refused": {"zone": 2}, "kept": kept} if kind else None,
        "fallback": fallback,
        "strategy": strategy,
        "spent": {"calls": 1, "tokens": 100, "dollars": dollars},
        "gain": gain,
    }


CHAINS = [
    chain(1, "targeted", 0.10, "format"),
    chain(2, "targeted", 0.20, "format"),
    chain(3, "raise", -0.05, fallback="breaker_open", dollars=0.0),
    chain(4, "worked", None, "logic"),
]


def test_the_chain_shown_is_the_one_with_the_largest_gain():
    assert best_chain(CHAINS)["round"] == 2
    assert best_chain(CHAINS[2:]) is None
    text = "\n\n".join(chain_parts(CHAINS, {"curator/llm/calls/analyst": 3.0}))
    assert "From a failure to a gain (round 2)" in text
    assert "1 were kept (refused: zone 2)" in text
    assert "accepted 3 (format 2, logic 1) and rejected 3" in text
    assert "planned alone in 1 rounds: 3 (breaker_open)" in text
    assert "| analyst | 3 | 0 | 0 |" in text


def test_opinions_on_pages_are_counted_with_what_they_cost():
    counts = {"calls/checker": 9, "failed/deadline": 2, "failed/rejected": 1, "spent/dollars": 0.25}
    title, text = checklist_parts({f"curator/checklist/{k}": float(v) for k, v in counts.items()})
    assert title == "## Opinions on pages"
    assert "9 questions of the checklist; 3 of them stayed without an answer" in text
    assert "cost $0.2500" in text


def test_gains_are_told_by_strategy_and_kind_and_by_pairs():
    _, single, pairs = effectiveness(CHAINS)
    # Mean 15 points of two rounds: half-width t(0.975, 1) * 7.07 / sqrt(2) = 12.706 * 5.
    row = "| targeted | format | 2 | +15.0 [-48.5, +78.5] | 200 | 1.0000 | 7 | 0.03333 |"
    assert row in single
    assert "| raise | - | 1 | -5.0 | 100 | 0.0000 | - | - |" in single
    assert "worked" not in single
    assert "| targeted | targeted | format | 1 | +20.0 |" in pairs
    assert "| targeted | raise | - | 1 | -5.0 |" in pairs
    assert effectiveness(CHAINS[3:]) == []


def test_the_same_is_in_tensorboard():
    values = figures(CHAINS)
    assert values["effect/targeted/format/gain"] == pytest.approx(15.0)
    assert values["effect/targeted/format/gain_low"] == pytest.approx(-48.53, abs=0.01)
    assert values["effect/targeted/format/gain_high"] == pytest.approx(78.53, abs=0.01)
    assert values["effect/targeted/format/rounds"] == 2.0
    assert values["effect/targeted/format/tokens_per_point"] == pytest.approx(200 / 30)
    assert values["effect/targeted/format/dollars_per_point"] == pytest.approx(1 / 30)
    assert values["effect_after/targeted/raise/none/gain"] == pytest.approx(-5.0)
    # A loss has no price a point, and one round no interval.
    assert "effect/raise/none/tokens_per_point" not in values
    assert "effect/raise/none/gain_low" not in values
    assert not any("worked" in name for name in values)  # not measured yet
    assert figures([]) == {}


def test_a_pair_is_two_measured_rounds_in_a_row():
    again = [*CHAINS, chain(5, "targeted", 0.3, "format"), chain(6, "raise", 0.1, "logic")]
    pairs = by_pair(again)
    assert set(pairs) == {
        ("raise", "targeted", "format"),
        ("targeted", "raise", "-"),
        ("targeted", "raise", "logic"),
        ("targeted", "targeted", "format"),
    }
    assert sum(len(effect.gains) for effect in pairs.values()) == 4
    assert sum(len(effect.gains) for effect in by_strategy(again).values()) == 5


def test_students_interval():
    # Ten values: t(0.975, 9) = 2.262157.
    values = [float(v) for v in range(10)]
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(4.5)
    assert (high - low) / 2 == pytest.approx(2.262157 * 3.0276504 / 10**0.5, rel=1e-6)
    assert mean_interval([1.0]) is None


def test_what_a_model_wrote_cannot_act_as_markdown():
    hostile = chain(1, "targeted", 0.1, "format", prompt="# A headline\n```\n<script>")
    (part,) = [p for p in chain_parts([hostile], {}) if "<script>" in p]
    assert "\n    # A headline\n    ```\n    <script>" in part
