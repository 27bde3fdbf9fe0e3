import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosr_jax.buckets import bucket_length, bucket_rows


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_rung_holds_its_sequence_with_little_padding(longest, limit):
    if longest > limit:
        with pytest.raises(ValueError, match="over the limit"):
            bucket_length(longest, limit)
        return
    rung = bucket_length(longest, limit)
    assert longest <= rung <= limit
    assert bucket_length(rung, limit) == rung
    if longest > 32:
        assert rung < 1.25 * longest


def test_the_ladder_has_four_rungs_an_octave():
    rungs = sorted({bucket_length(n, 250) for n in range(1, 251)})
    assert rungs == [16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 250]


@given(st.integers(1, 3000), st.integers(0, 3000), st.sampled_from([1, 2, 4, 8, 6]))
def test_a_bucket_holds_its_rows_within_a_quarter_and_the_limit(count, room, multiple):
    limit = count + room
    size = bucket_rows(count, limit, multiple)
    assert size >= count and size % multiple == 0
    # Only the mesh's pieces may go beyond.
    assert size < min(count * 1.25, limit) + multiple
    if multiple == 1:
        assert bucket_rows(size, limit) == size


def test_row_buckets_grow_with_the_logarithm_and_never_shrink():
    sizes = [bucket_rows(n, 1024) for n in range(1, 1025)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * 10


def test_more_rows_than_the_limit_are_refused():
    with pytest.raises(ValueError, match="5 rows are over the limit of 4"):
        bucket_rows(5, 4)
