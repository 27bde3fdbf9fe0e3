"""The adapter finds what a student wrote, and no checker can make it find anything else."""

import asyncio
import json

import pytest
from fakes import FakeChat, FakeEngine
from free_texts import STATED, TASK, UNSTATED
from openai_server import OpenAiServer, answer, completion, error

from cosr_jax.config import from_config_dict
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.evaluate import keep_adaptations
from cosr_jax.run.evaluation import measure
from cosr_jax.run.practice import sample_groups
from cosr_jax.types import Completion, Outcome, SamplingParams, Task, UserError, Verdict
from cosr_jax.verifiers.dispatch import Answer
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.maths import MathJudge

GOLD = Task("math", "s", 0.5, TASK, "12", "cups", "\\boxed{12}")


class NoAlgebra:
    """Workers to whom no two expressions are the same."""

    async def ask(self, *_):
        return Answer({"agree": False})


class Judge:
    """The verifier of maths, in this process."""

    def __init__(self, accept=("boxed",)):
        self._judge = MathJudge(accept, NoAlgebra())

    def judge(self, cases):
        async def all_():
            return [await self._judge.judge(t, c, Limits(1.0, 64, 64, 1)) for t, c in cases]

        return asyncio.run(all_())


def done(text, finish_reason="stop"):
    return Completion((), (), text, finish_reason)


def adapter(url, accept=("boxed",), adapt="evaluation", **llm):
    llm = {"endpoints": (f"judge {url}",), "max_attempts": 1, "max_reasks": 0, **llm}
    values = {"verifier": {"accept": accept, "adapt": adapt}, "curator": {"llm": llm}}
    return Adapter(from_config_dict(values), Judge(accept))


class Pointer:
    """Points at the ``occurrence``-th place of ``quote``, if the text has so many."""

    def __init__(self, quote="12", occurrence=1):
        self.quote, self.occurrence, self.bodies = quote, occurrence, []

    def __call__(self, exchange):
        self.bodies.append(exchange.body)
        text = json.dumps({"quote": self.quote, "occurrence": self.occurrence})
        exchange.respond(200, json.dumps(completion(text)).encode())


@pytest.fixture(scope="module")
def malicious():
    """Judges texts with a checker that points at the gold answer wherever it stands.

    Every place, and every quotation of up to a few characters around it, is tried.
    """
    pointer = Pointer()
    with OpenAiServer(pointer) as server:
        looked_at = adapter(server.url)

        def passes(text, gold="12"):
            task = Task("math", "s", 0.5, TASK, gold, "cups", f"\\boxed{{{gold}}}")
            case = [(task, done(text))]
            raw = Judge().judge(case)
            outcomes = []
            for occurrence in range(1, text.count(gold) + 2):
                for quote in (gold, f"{gold} cups", f"is {gold}", f"{gold}.", gold[:1]):
                    pointer.quote, pointer.occurrence = quote, occurrence
                    outcomes += looked_at.adapt(case, raw)
            return [v for v in outcomes if v.outcome is Outcome.PASS]

        yield passes


def test_there_are_enough_attacks():
    assert len(set(UNSTATED)) >= 60


@pytest.mark.parametrize("text", UNSTATED)
def test_a_malicious_checker_makes_no_wrong_answer_right(text, malicious):
    assert not malicious(text)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is 12 minutes", "12 hours"),
        ("The answer is 12 cm", "12 m"),
        ("The answer is 12%", "12"),
        ("The answer is 7. Check: 5 + 7 = 12", "12"),
        ("So it has 7 cups. 5 + 7 = 12", "12"),
        ("The answer is 7", "12"),
        ("The answer is -12", "12"),
        ("The answer is 5 + 7", "12"),
        ("5 + 7", "12"),
        ("I would like 12", "12"),
    ],
)
def test_nor_does_a_value_of_another_kind_pass(text, gold, malicious):
    assert not malicious(text, gold)


@pytest.mark.parametrize(("text", "written"), STATED)
def test_a_stated_answer_passes_if_it_is_right_and_pointed_at(text, written):
    value = written.removesuffix(" cups")
    right, wrong = (
        Task("math", "s", 0.5, TASK, gold, "cups", f"\\boxed{{{gold}}}") for gold in (value, "99")
    )
    cases = [(right, done(text)), (wrong, done(text))]
    raw = Judge().judge(cases)
    assert [v.outcome for v in raw] == [Outcome.FAIL] * 2
    places = range(1, text.count(written) + 1)
    outcomes = []
    for occurrence in places:
        with OpenAiServer(Pointer(written, occurrence)) as server:
            looked_at = adapter(server.url)
            outcomes.append([v.outcome for v in looked_at.adapt(cases, raw)])
    assert [Outcome.PASS, Outcome.FAIL] in outcomes
    assert all(wrong is Outcome.FAIL for _, wrong in outcomes)


def test_the_checker_sees_neither_task_nor_answer():
    pointer = Pointer("12", 1)
    task = Task("math", "s", 0.5, "How many cups are there?", "31337", "k", "\\boxed{31337}")
    with OpenAiServer(pointer) as server:
        case = [(task, done("The answer is 12"))]
        adapter(server.url).adapt(case, Judge().judge(case))
    (body,) = pointer.bodies
    assert json.loads(body["messages"][1]["content"]) == {"data": {"text": "The answer is 12"}}
    assert "31337" not in json.dumps(body) and "cups" not in json.dumps(body)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("\\boxed{12}", Outcome.PASS),  # there is nothing to adapt
        ("\\boxed{7} The answer is 12", Outcome.FAIL),  # it was in the right form, and wrong
    ],
)
def test_what_was_judged_in_its_form_is_not_looked_at(text, outcome):
    pointer = Pointer()
    with OpenAiServer(pointer) as server:
        case = [(GOLD, done(text))]
        raw = Judge().judge(case)
        assert adapter(server.url).adapt(case, raw) == raw
    assert raw[0].outcome is outcome and not pointer.bodies


def test_errors_and_other_domains_stay():
    pointer = Pointer()
    cases = [(GOLD, done("12")), (GOLD, done("12"))]
    raw = [Verdict(Outcome.ERROR, 0.0), Verdict(Outcome.FAIL, 0.0, "no_code")]
    with OpenAiServer(pointer) as server:
        assert adapter(server.url).adapt(cases, raw) == raw
    assert not pointer.bodies


@pytest.mark.parametrize(
    "act",
    [
        error(500, "no"),
        answer("12"),
        answer('{"quote": "", "occurrence": 1}'),
        answer('{"quote": "12", "occurrence": 2}'),
        answer('{"quote": "12"}'),
        answer('[{"quote": "12", "occurrence": 1}, {"quote": "7", "occurrence": 1}]'),
        answer(None, reasoning='{"quote": "12", "occurrence": 1}'),
    ],
)
def test_without_a_clear_word_of_the_checkers_the_verdict_stays(act):
    case = [(GOLD, done("The answer is 12"))]
    raw = Judge().judge(case)
    with OpenAiServer(act) as server:
        assert adapter(server.url).adapt(case, raw) == raw


def test_both_verdicts_are_logged(tmp_path):
    case = [(GOLD, done("So the answer is 12 cups.")), (GOLD, done("The answer is 13"))]
    with OpenAiServer(Pointer("12")) as server:
        looked_at = adapter(server.url)
        looked_at.adapt(case, Judge().judge(case))
        records = [r for r in looked_at.take_records() if r["event"] == "adaptation"]
        assert looked_at.take_records() == []
        looked_at.adapt(case, Judge().judge(case))
        keep_adaptations(tmp_path / "samples/adapted.jsonl", looked_at)
    (record,) = records
    (line,) = (tmp_path / "samples/adapted.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == record
    assert record["text"] == "So the answer is 12 cups." and record["quote"] == "12 cups"
    assert record["raw"] == {"outcome": "fail", "category": "no_answer"}
    assert record["adapted"] == {"outcome": "pass", "category": ""}
    figures = looked_at.figures()
    assert [figures[f"curator/adapter/{n}"] for n in ("looked_at", "pointed_at", "passed")] == [
        4.0,
        2.0,
        2.0,
    ]


@pytest.mark.parametrize("form", ["boxed", "answer_tag", "hashes", "phrase"])
def test_answers_are_given_in_the_form_of_the_run(form):
    case = [(GOLD, done("5 + 7 = 12"))]
    raw = Judge((form,)).judge(case)
    with OpenAiServer(Pointer("12")) as server:
        (verdict,) = adapter(server.url, (form,)).adapt(case, raw)
    assert (raw[0].outcome, verdict.outcome) == (Outcome.FAIL, Outcome.PASS)
    assert verdict.method == form


def test_evaluation_keeps_the_verifiers_verdict_beside_the_adapted_one():
    tasks = [GOLD, Task("math", "s", 0.5, "What is 3 + 4?", "7", "k", "\\boxed{7}")]
    engine = FakeEngine(lambda *_: "The answer is 12")
    with OpenAiServer(Pointer("12")) as server:
        result = measure(tasks, engine, FakeChat(), Judge(), 32, adapter(server.url))
    assert result.strict == (False, False) and result.accuracy == 0.0
    assert result.adapted == (True, False) and result.adapted_accuracy == 0.5
    assert measure(tasks, engine, FakeChat(), Judge(), 32).adapted == ()


def test_rewards_are_adapted_only_when_asked_to():
    engine = FakeEngine(lambda *_: "The answer is 12")
    sampling = SamplingParams(32)

    def rewards(adapter):
        groups = sample_groups([GOLD], 2, sampling, engine, FakeChat(), Judge(), 0, adapter)
        return [verdict.reward for verdict in groups[0].verdicts]

    with OpenAiServer(Pointer("12")) as server:
        assert rewards(None) == [0.0, 0.0]
        assert rewards(adapter(server.url, adapt="rewards")) == [1.0, 1.0]
    assert from_config_dict({}).verifier.adapt == "never"


def test_an_adapter_needs_a_model():
    with pytest.raises(UserError, match=r"config\.verifier\.adapt: 'evaluation' needs a model"):
        from_config_dict({"verifier": {"adapt": "evaluation"}})


def test_a_resumed_adapter_goes_on_counting():
    case = [(GOLD, done("The answer is 12"))]
    with OpenAiServer(Pointer("12")) as server:
        one, other = adapter(server.url), adapter(server.url)
        one.adapt(case, Judge().judge(case))
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.figures() == one.figures()
