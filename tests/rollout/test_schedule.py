"""Rows and slots, without a device."""

from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.rollout.schedule import Layout, Schedule

SIZES = {"prompts": st.integers(1, 9), "samples": st.integers(1, 5), "slots": st.integers(1, 12)}


def run(schedule, lengths, slots):
    """Decodes rows of these lengths; returns who entered when, and the steps it took."""
    entered, left, steps = [], {}, 0
    while not schedule.is_done:
        for slot, row in schedule.enter():
            assert slot not in left and 0 <= slot < slots
            entered.append(row)
            left[slot] = lengths[row]
        steps += 1
        for slot in [slot for slot, _ in schedule.running()]:
            left[slot] -= 1
            if left[slot] == 0:
                schedule.leave(slot)
                del left[slot]
    return entered, steps


@given(**SIZES, data=st.data(), refill=st.booleans())
def test_every_row_enters_once_in_order(prompts, samples, slots, data, refill):
    rows = prompts * samples
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows))
    entered, steps = run(Schedule(prompts, samples, slots, refill), lengths, slots)
    assert entered == list(range(rows))
    batches = [lengths[start : start + slots] for start in range(0, rows, slots)]
    whole = sum(max(batch) for batch in batches)
    assert steps <= whole if refill else steps == whole


def test_refilled_slots_do_not_wait_for_the_longest():
    lengths = [8, 1, 1, 1, 1, 1, 1, 1]
    assert run(Schedule(8, 1, 2, refill=True), lengths, 2)[1] == 8
    assert run(Schedule(8, 1, 2, refill=False), lengths, 2)[1] == 11


def test_withdrawn_rows_never_enter():
    schedule = Schedule(3, 2, 2, refill=True)
    schedule.enter()
    assert schedule.withdraw(1) == [2, 3]
    assert not schedule.withdraw(0)
    schedule.leave(0)
    assert schedule.enter() == [(0, 4)]


@given(**SIZES, shards=st.sampled_from([1, 2, 4]))
def test_layouts_hold_all_rows_or_as_many_as_allowed(prompts, samples, slots, shards):
    layout = Layout.of(prompts, samples, slots, shards)
    assert layout.places % shards == 0 and layout.slots % layout.places == 0
    if prompts * samples <= slots:
        assert layout.slots >= prompts * samples
        assert layout.slots // layout.places == samples
    else:
        assert layout.slots == layout.places
    assert layout.slots < slots + shards * samples
