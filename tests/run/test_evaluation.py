import json

import pytest
from fakes import FakeChat, FakeEngine, FakeVerifier, make_task
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.run.evaluation import ProbeResult, measure
from cosr_jax.types import SamplingParams

TASKS = [make_task("addition/1", number) for number in range(5)]
#: Boxed right, bare right, boxed wrong, not to be judged, cut by the limit.
ANSWERS = dict(
    zip([task.prompt for task in TASKS], ["[0]", "1", "[9]", "?", "[4444]"], strict=True)
)


def measured(tasks=TASKS, max_new_tokens=5):
    engine = FakeEngine(lambda prompt, sample, seed: ANSWERS[prompt])
    return measure(tasks, engine, FakeChat(), FakeVerifier(), max_new_tokens), engine


def test_every_task_is_answered_once_greedily_in_order():
    _, engine = measured()
    ((prompts, num_generations, sampling, _),) = engine.calls
    assert prompts == tuple(task.prompt for task in TASKS)
    assert num_generations == 1
    assert sampling == SamplingParams(5, temperature=0.0)


def test_verdicts_become_columns_in_the_tasks_order():
    result, _ = measured()
    assert result.strict == (True, False, False, False, False)
    assert result.lenient == (True, True, False, False, False)
    assert result.categories == ("", "no_answer", "wrong_answer", "", "wrong_answer")
    assert result.answers == ("[0]", "1", "[9]", "?", "[4444")
    assert result.generated_tokens == 4 + 2 + 4 + 2 + 5


def test_what_could_not_be_judged_is_neither_right_nor_wrong():
    result, _ = measured()
    assert result.judged == (True, True, True, False, True)
    assert result.num_judged == 4
    assert result.accuracy == 1 / 4


def test_nothing_judged_is_no_accuracy_to_speak_of():
    result, _ = measured(TASKS[3:4])
    assert (result.num_judged, result.accuracy) == (0, 0.0)


def test_the_same_student_measures_the_same():
    first, engine = measured()
    second, again = measured()
    assert first == second
    assert engine.calls == again.calls


def test_a_missing_verdict_is_no_shorter_result():
    class Short(FakeVerifier):
        def judge(self, cases):
            return super().judge(cases)[:-1]

    engine = FakeEngine(lambda prompt, sample, seed: "[0]")
    with pytest.raises(ValueError, match="0 verdicts for 1 completions"):
        measure(TASKS, engine, FakeChat(), Short(), 5)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.text()), max_size=5), st.integers(0))
def test_a_result_survives_json(rows, tokens):
    judged, strict, texts = (
        (tuple(column) for column in zip(*rows, strict=True)) if rows else ((),) * 3
    )
    result = ProbeResult(judged, strict, strict, texts, texts, tokens)
    assert ProbeResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
