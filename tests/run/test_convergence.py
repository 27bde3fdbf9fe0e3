import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.config import ConvergenceConfig
from cosr_jax.run.convergence import (
    REPEATED_Z,
    ConvergenceState,
    Measurement,
    flattest_trend,
    update,
)
from cosr_jax.run.statistics import standard_error

CONFIG = ConvergenceConfig()
TASKS = 200
RUNS = 200


def run(scores, config=CONFIG, n=TASKS, **others):
    """Feeds scores to ``update``; returns all decisions up to the first stop."""
    state, decisions = ConvergenceState(), []
    for i, score in enumerate(scores):
        measured = {name: values[i] for name, values in others.items()}
        state, decision = update(
            config, state, Measurement(4 * i, score, standard_error(score, n), **measured)
        )
        decisions.append(decision)
        if decision.stop:
            break
    return decisions


def simulate(rates, n, seed):
    """Scores [RUNS, rounds] of binomial measurements of ``rates`` on ``n`` tasks."""
    return np.random.default_rng(seed).binomial(n, rates, size=(RUNS, len(rates))) / n


def test_a_synthetic_plateau_has_converged():
    scores = [0.1, 0.3, 0.5, 0.7] + [0.8] * 20
    decision = run(scores)[-1]
    assert (decision.stop, decision.status) == (True, "converged")
    assert decision.reason.startswith("plateau: over the last ")


def test_the_plateau_needs_patience_rounds_in_a_row():
    for patience in (1, 4):
        config = dataclasses.replace(CONFIG, patience=patience)
        assert len(run([0.98] * 20, config)) == CONFIG.window + patience - 1


def test_the_noisier_the_measurements_the_longer_the_plateau_must_be():
    lengths = [len(run([0.5] * 40, n=n)) for n in (10_000, 200, 100, 50)]
    assert lengths == sorted(set(lengths))
    assert lengths[0] == CONFIG.window + CONFIG.patience - 1


@pytest.mark.parametrize("n", [200, 100])
@pytest.mark.parametrize(("start", "rise"), [(0.3, 0.01), (0.1, 0.02), (0.4, 0.02), (0.6, 0.015)])
def test_noise_over_a_slow_rise_rarely_stops(start, rise, n):
    rates = start + rise * np.arange(21)
    false_stops = sum(run(row, n=n)[-1].stop for row in simulate(rates, n, seed=1))
    assert false_stops / RUNS <= 0.05


@pytest.mark.parametrize(("n", "power"), [(200, 0.98), (100, 0.8)])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_a_true_plateau_under_noise_is_found_within_20_rounds(n, power, level):
    rates = np.concatenate([np.linspace(0.1, level, 5), np.full(16, level)])
    ends = [run(row, n=n)[-1] for row in simulate(rates, n, seed=2)]
    found = [end.status == "converged" for end in ends]
    assert np.mean(found) >= power
    assert {end.status for end in ends} <= {"converged", ""}  # never taken for a regression


def test_a_pause_in_the_rise_is_not_a_plateau():
    scores = [*np.linspace(0.1, 0.4, 7), 0.4, 0.4, *np.linspace(0.45, 0.9, 10)]
    assert not any(decision.stop for decision in run(scores))


def test_flattest_trend_equals_least_squares():
    scores = [0.1, 0.5, 0.52, 0.5, 0.53, 0.51, 0.52]
    errors = [0.03] * len(scores)
    trend = flattest_trend(scores, errors, window=4)
    fits = {}
    for rounds in range(4, 8):
        time = np.arange(rounds)
        slope = np.polyfit(time, scores[-rounds:], 1)[0]
        spread = np.sum((time - time.mean()) ** 2)
        fits[rounds] = (slope + REPEATED_Z * 0.03 / math.sqrt(spread), slope)
    rounds = min(fits, key=fits.get)
    assert trend.rounds == rounds == 6  # leaves the first jump out, keeps all the rest
    assert trend.slope == pytest.approx(fits[rounds][1])
    assert trend.upper == pytest.approx(fits[rounds][0])
    assert flattest_trend(scores[:3], errors[:3], window=4) is None


def test_the_best_is_the_first_of_the_highest():
    decisions = run([0.3, 0.5, 0.5, 0.4, 0.6])
    assert [decision.is_best for decision in decisions] == [True, True, False, False, True]


def test_a_regression_beyond_noise_stops_and_names_the_best():
    decision = run([0.2, 0.7, 0.3])[-1]
    assert decision.status == "stopped"
    assert "fell from 0.700 at step 4 to 0.300" in decision.reason


def test_a_drop_within_noise_does_not_stop():
    assert not run([0.7, 0.52], n=200)[-1].stop  # 0.18, of which 0.06 is sure
    assert run([0.7, 0.4], n=200)[-1].stop  # 0.30, of which 0.18 is sure
    assert not run([0.7, 0.4], n=10)[-1].stop


def test_noise_alone_is_hardly_ever_a_regression():
    config = dataclasses.replace(CONFIG, patience=100)  # no plateau: all rounds are seen
    scores = simulate(np.full(21, 0.5), 100, seed=3)
    assert sum(run(row, config, n=100)[-1].stop for row in scores) <= 0.01 * RUNS


def test_the_target_must_be_reached_beyond_noise():
    config = dataclasses.replace(CONFIG, target=0.7)
    assert not run([0.72], config)[-1].stop
    decision = run([0.76], config)[-1]
    assert decision.status == "converged"
    assert "reached the target 0.7" in decision.reason


def test_everything_solved_ends_the_run():
    decision = run([0.5, 1.0])[-1]
    assert decision == (True, "converged", "every validation task is solved", True)


RISE = [0.1 * i for i in range(1, 9)]


@pytest.mark.parametrize(
    ("name", "bad", "good", "status", "words"),
    [
        ("entropy", 0.001, 0.5, "stopped", "entropy collapsed: under 0.005 nats"),
        ("truncated_share", 0.95, 0.2, "stopped", "length limit: more than 90% of them"),
        ("informative_share", 0.0, 0.3, "no_signal", "in 3 GRPO rounds in a row"),
    ],
)
def test_collapse_and_silence_count_measured_rounds_in_a_row(name, bad, good, status, words):
    broken_up = [bad, bad, good, bad, bad, good, good, good]
    assert not run(RISE, **{name: broken_up})[-1].stop
    # An SFT round measures none of these: it neither counts nor resets the count.
    decisions = run(RISE, **{name: [good, bad, None, bad, None, bad, good, good]})
    assert len(decisions) == 6
    assert decisions[-1].status == status
    assert words in decisions[-1].reason


@given(st.lists(st.integers(0, 50), min_size=1, max_size=15), st.integers(0, 14))
def test_a_state_that_went_through_json_decides_the_same(counts, cut):
    def play(through_json):
        state, decisions = ConvergenceState(), []
        for i, count in enumerate(counts):
            if through_json and i == cut:
                state = ConvergenceState.from_dict(json.loads(json.dumps(state.to_dict())))
            score = count / 50
            measured = Measurement(i, score, standard_error(score, 50), informative_share=score)
            state, decision = update(CONFIG, state, measured)
            decisions.append(decision)
        return state, decisions

    assert play(True) == play(False)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_a_score_that_is_no_share_is_refused(bad):
    with pytest.raises(ValueError, match="score"):
        update(CONFIG, ConvergenceState(), Measurement(0, bad, 0.1))
    with pytest.raises(ValueError, match="standard_error"):
        update(CONFIG, ConvergenceState(), Measurement(0, 0.5, bad))
