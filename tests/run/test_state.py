import dataclasses
import json

from fakes import make_task
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.run.convergence import ConvergenceState, Measurement
from cosr_jax.run.evaluation import ProbeResult
from cosr_jax.run.state import LoopState, RoundTally
from cosr_jax.types import CellEvidence, Completion, Outcome, Plan, RolloutGroup, Verdict

floats = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)


def maybe(strategy):
    return st.none() | strategy


def columns(strategy):
    return st.lists(strategy, max_size=4).map(tuple)


plans = st.builds(
    Plan,
    strategy=st.text(),
    algorithm=st.sampled_from(["sft", "grpo"]),
    mixture=columns(st.tuples(st.text(), floats)),
    steps=counts,
    replay_fraction=floats,
    learning_rate_scale=floats,
    context=st.text(),
    reason=st.text(),
)
measurements = st.builds(
    Measurement, counts, floats, floats, maybe(floats), maybe(floats), maybe(floats)
)
states = st.builds(
    LoopState,
    step=counts,
    round=counts,
    plan=maybe(plans),
    algorithm=st.text(),
    tally=st.builds(
        RoundTally,
        *[counts] * 6,
        floats,
        counts,
        st.dictionaries(st.text(), st.lists(counts, min_size=2, max_size=2)),
    ),
    evidence=st.lists(st.builds(CellEvidence, st.text(), *[counts] * 6), max_size=3),
    convergence=st.builds(
        ConvergenceState, columns(floats), columns(floats), maybe(measurements), *[counts] * 4
    ),
    before=st.dictionaries(
        st.text(),
        st.builds(
            ProbeResult,
            *[columns(st.booleans())] * 3,
            *[columns(st.text())] * 2,
            counts,
        ),
        max_size=2,
    ),
    generated_tokens=counts,
    wall_s=floats,
    status=st.text(),
    reason=st.text(),
)


@given(states)
def test_the_state_survives_json_to_the_last_bit(state):
    text = json.dumps(state.to_dict(), allow_nan=False)
    restored = LoopState.from_dict(json.loads(text))
    assert restored == state
    # Equality lets -0.0 pass for 0.0 and a list differ from a tuple only sometimes.
    assert repr(restored) == repr(state)


def test_the_start_survives_too_and_nothing_is_shared():
    state = LoopState()
    restored = LoopState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert restored == state == LoopState()
    restored.tally.steps += 1
    restored.evidence.append(CellEvidence("a/1"))
    assert state == LoopState()


def test_saving_leaves_the_state_alone():
    state = LoopState(before={"test": ProbeResult((True,), (True,), (True,), ("",), ("1",), 1)})
    saved = state.to_dict()
    saved["before"].clear()
    saved["tally"]["steps"] = 9
    assert list(state.before) == ["test"]
    assert state.tally.steps == 0


def test_the_score_is_the_latest_measurement():
    assert LoopState().score is None
    state = LoopState(convergence=ConvergenceState(scores=(0.25, 0.5)))
    assert state.score == 0.5


def group(*verdicts, cut=0):
    completions = tuple(
        Completion((1,), (-1.0,), "", "length" if i < cut else "stop") for i in range(len(verdicts))
    )
    return RolloutGroup(make_task("a/1", 1), (1,), completions, verdicts)


PASSED, FAILED, ERROR = (
    Verdict(Outcome.PASS, 1.0),
    Verdict(Outcome.FAIL, 0.0, "wrong_answer"),
    Verdict(Outcome.ERROR, 1.0),
)


def test_a_tally_adds_up_over_steps():
    tally = RoundTally()
    tally.count([group(PASSED, FAILED, ERROR), group(FAILED, ERROR, cut=2)])
    tally.count([group(PASSED, PASSED, cut=1)])
    assert dataclasses.asdict(tally) == dataclasses.asdict(
        RoundTally(
            groups=3,
            informative_groups=1,
            samples=7,
            errors=2,
            truncated=3,
            by_domain={"math": [7, 2]},
        )
    )
    assert tally.informative_share == 1 / 3
    assert tally.error_share == 2 / 7
    assert tally.share(tally.truncated, tally.samples) == 3 / 7


def test_an_empty_tally_has_no_shares():
    tally = RoundTally()
    assert tally.informative_share is None
    assert tally.error_share == 0.0
    assert tally.share(0, 0) is None
