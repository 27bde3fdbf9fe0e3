"""Backoff, breaker and budget as pure things: what holds whatever happens."""

import json
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cosr_jax.config import CuratorLlmConfig
from cosr_jax.curator.backoff import backoff_s, retry_after_s
from cosr_jax.curator.breaker import Breaker, Permit
from cosr_jax.curator.budget import Budget, Room
from cosr_jax.curator.calls import Charge, Message, Request, estimate_tokens
from cosr_jax.curator.endpoints import Endpoint, parse_endpoints, parse_roles
from cosr_jax.types import UserError

NOW = datetime(2026, 11, 21, 8, 0, tzinfo=UTC)


# --- backoff


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_backoff_doubles_up_to_a_minute_and_half_of_it_is_chance(retry, seed):
    longest = min(2.0 ** min(retry, 6), 60.0)
    assert longest / 2 <= backoff_s(retry, random.Random(seed)) <= longest


def test_clients_that_failed_together_come_back_apart():
    waits = {backoff_s(3, random.Random(seed)) for seed in range(50)}
    assert len(waits) == 50 and max(waits) - min(waits) > 2.0


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": " 12 "}, 12.0),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=90), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(NOW - timedelta(days=1), usegmt=True)}, 0.0),
        ({"retry-after": "Saturday, 21-Nov-26 08:01:00 GMT"}, 60.0),  # RFC 850's form
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Sat, 99 Nov 2026 08:00:00 GMT"}, None),
        ({}, None),
    ],
)
def test_what_retry_after_means(headers, expected):
    assert retry_after_s(headers, NOW.timestamp()) == expected


@given(st.text())
def test_no_retry_after_is_negative_infinite_or_a_crash(text):
    seconds = retry_after_s({"retry-after": text}, NOW.timestamp())
    assert seconds is None or 0.0 <= seconds < float("inf")


# --- breaker


class BreakerMachine(RuleBasedStateMachine):
    """A breaker against what it promises, request by request."""

    LIMIT, COOLDOWN = 3, 60.0

    def __init__(self):
        super().__init__()
        self.breaker = Breaker(self.LIMIT, self.COOLDOWN)
        self.now = 0.0
        self.opened_at = None
        self.in_a_row = 0
        self.under_way: list[Permit] = []
        self.probe: Permit | None = None

    @rule(seconds=st.sampled_from([0.1, 29.0, 60.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def a_request_asks_leave(self):
        is_cool = self.opened_at is None or self.now >= self.opened_at + self.COOLDOWN
        permit = self.breaker.admit(self.now)
        assert (permit is not None) == (is_cool and self.probe is None)
        if permit is not None:
            self.under_way.append(permit)
            if self.opened_at is not None:
                self.probe = permit

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), is_healthy=st.sampled_from([True, False, False, None]))
    def a_request_ends(self, data, is_healthy):
        permit = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        is_probe = permit is self.probe
        opened = self.breaker.settle(permit, is_healthy, self.now)
        opens = False
        if is_probe or is_healthy:
            self.probe = None
        if is_healthy:
            self.opened_at, self.in_a_row = None, 0
        elif is_healthy is False and self.opened_at is None:
            self.in_a_row += 1
            opens = self.in_a_row == self.LIMIT
        elif is_healthy is False:
            opens = is_probe
        assert opened == opens
        if opens:
            self.opened_at = self.now

    @invariant()
    def it_is_open_only_after_failures_in_a_row(self):
        is_closed = self.breaker.state(self.now) == "closed"
        assert is_closed == (self.opened_at is None)

    @invariant()
    def its_state_survives_json_and_another_clock(self):
        other = Breaker(self.LIMIT, self.COOLDOWN)
        other.load_state_dict(json.loads(json.dumps(self.breaker.state_dict(self.now))), 5.0)
        if self.probe is None:
            assert other.state(5.0) == self.breaker.state(self.now)


TestBreaker = BreakerMachine.TestCase


def test_five_failures_open_it_for_a_minute_and_one_probe_decides():
    breaker = Breaker(5, 60.0)
    for number in range(5):
        assert breaker.settle(breaker.admit(0.0), False, 0.0) == (number == 4)
    assert breaker.admit(59.9) is None
    probe = breaker.admit(60.0)
    assert breaker.is_probing and breaker.admit(60.0) is None
    assert breaker.settle(probe, False, 61.0)
    assert breaker.admit(120.9) is None
    breaker.settle(breaker.admit(121.0), True, 121.0)
    assert breaker.state(121.0) == "closed"


def test_a_success_in_between_starts_the_count_again():
    breaker = Breaker(2, 60.0)
    for is_healthy in (False, True, False):
        assert not breaker.settle(breaker.admit(0.0), is_healthy, 0.0)


def test_a_probe_that_we_gave_up_leaves_the_question_open():
    breaker = Breaker(1, 60.0)
    breaker.settle(breaker.admit(0.0), False, 0.0)
    breaker.settle(breaker.admit(60.0), None, 61.0)
    assert breaker.state(61.0) == "half_open"
    assert breaker.admit(61.0) is not None and breaker.is_probing


# --- budget

LIMITS = CuratorLlmConfig(
    calls_per_run=20, tokens_per_run=1_000, tokens_per_round=400, dollars_per_run=1e-6
)
COSTS = st.builds(
    lambda prompt, completion: Charge(1, prompt, completion, 1_000 * completion),
    st.integers(0, 200),
    st.integers(0, 200),
)


class BudgetMachine(RuleBasedStateMachine):
    """Requests in any order: what is set aside and spent never passes a limit."""

    def __init__(self):
        super().__init__()
        self.budget = Budget(LIMITS)
        self.under_way: list[Charge] = []
        self.round = 0

    @rule(worst=COSTS)
    def a_request_asks_for_room(self, worst):
        room, limit = self.budget.room(worst)
        assert (room is Room.YES) == (limit == "")
        if room is Room.YES:
            self.budget.reserve(worst)
            self.under_way.append(worst)
        else:
            with pytest.raises(ValueError, match=limit):
                self.budget.reserve(worst)
        if not self.under_way:
            assert room is not Room.LATER, "nothing under way, so nothing will come back"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), share=st.floats(0.0, 1.0))
    def a_request_ends(self, data, share):
        worst = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        prompt, completion = int(worst.prompt_tokens * share), int(worst.completion_tokens * share)
        self.budget.settle(worst, Charge(1, prompt, completion, 1_000 * completion))

    @precondition(lambda self: not self.under_way)
    @rule()
    def a_round_begins(self):
        self.round += 1
        self.budget.start_round(self.round)

    @invariant()
    def nothing_is_overspent(self):
        run, this_round = self.budget.spent_in_run, self.budget.spent_in_round
        assert run.calls <= 20 and run.tokens <= 1_000 and run.dollars <= 1e-6
        assert this_round.tokens <= 400

    @invariant()
    def state_survives_json(self):
        other = Budget(LIMITS)
        other.load_state_dict(json.loads(json.dumps(self.budget.state_dict())))
        assert other.state_dict() == self.budget.state_dict()


TestBudget = BudgetMachine.TestCase


def test_a_round_that_is_resumed_goes_on_with_what_it_spent():
    budget = Budget(LIMITS)
    budget.start_round(2)
    budget.charge(Charge(1, 300, 0, 0))
    other = Budget(LIMITS)
    other.load_state_dict(budget.state_dict())
    other.start_round(2)
    assert other.room(Charge(1, 101, 0, 0)) == (Room.NO, "tokens_per_round")
    other.start_round(3)
    assert other.room(Charge(1, 101, 0, 0)) == (Room.YES, "")


def test_no_limit_is_no_limit():
    assert Budget(CuratorLlmConfig()).room(Charge(10**9, 10**9, 10**9, 10**18)) == (Room.YES, "")


@given(st.permutations(range(6)))
def test_the_order_of_charges_does_not_matter(order):
    endpoint = Endpoint("a", "u", "m", input_price=150_001, output_price=600_007)
    charges = [endpoint.cost(7 * i, 3 * i * i) for i in range(6)]
    assert sum((charges[i] for i in order), Charge()) == sum(charges, Charge())


# --- estimates and endpoints


@given(st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_the_bound_of_a_prompt_is_over_its_estimate(texts):
    request = Request("analyst", tuple(Message("user", text) for text in texts))
    assert request.prompt_tokens <= request.most_prompt_tokens
    assert request.most_prompt_tokens >= sum(len(t.encode("utf-8", "replace")) for t in texts)
    assert estimate_tokens("x" * 30) == 10


def test_every_option_of_an_endpoint():
    line = "big https://host.example:8443/v1/ model=openai/gpt-oss-120b key=BIG_KEY input=0.1 "
    line += "output=.5 context=131072 sampling=plain"
    assert parse_endpoints((line,)) == {
        "big": Endpoint(
            name="big",
            url="https://host.example:8443/v1",
            model="openai/gpt-oss-120b",
            key_variable="BIG_KEY",
            input_price=100_000,
            output_price=500_000,
            context=131_072,
            extended_sampling=False,
        )
    }
    (small,) = parse_endpoints(("small http://[::1]:8000/v1",)).values()
    assert (small.model, small.context, small.input_price) == ("small", 65_536, 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "name",
        "name ftp://host/v1",
        "name http:///v1",
        "name host:8000/v1",
        "name http://user:secret@host/v1",
        "na/me http://host/v1",
        "name http://host/v1 colour=red",
        "name http://host/v1 model=",
        "name http://host/v1 model=a model=b",
        "name http://host/v1 input=-1",
        "name http://host/v1 output=cheap",
        "name http://host/v1 context=10",
        "name http://host/v1 context=1e5",
        "name http://host/v1 sampling=greedy",
        "name http://host/v1 key=sk-not-a-variable",
    ],
)
def test_an_endpoint_that_makes_no_sense_is_refused(line):
    with pytest.raises(UserError, match=r"config\.curator\.llm\.endpoints"):
        parse_endpoints((line,))


def test_names_come_once_and_roles_name_what_is_there():
    with pytest.raises(UserError, match="twice"):
        parse_endpoints(("a http://h/v1", "a http://i/v1"))
    endpoints = parse_endpoints(("a http://h/v1", "b http://i/v1"))
    routes = parse_roles(("author=b,a,b", "checker=a"), endpoints)
    names = {role: [e.name for e in route] for role, route in routes.items()}
    assert names == {
        "analyst": ["a", "b"],
        "planner": ["a", "b"],
        "author": ["b", "a"],
        "checker": ["a"],
    }
    for line in ("author", "teacher=a", "author=", "author=c", "=a"):
        with pytest.raises(UserError, match=r"config\.curator\.llm\.roles"):
            parse_roles((line,), endpoints)
