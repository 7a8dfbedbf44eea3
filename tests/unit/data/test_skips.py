import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.skips import SkippedRanges

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)).map(lambda s: (s[0], s[0] + s[1])), max_size=6)


@given(RANGES)
def test_kept_positions_are_those_in_no_range(ranges):
    skips = SkippedRanges(ranges)
    kept = [p for p in range(200) if not any(first <= p <= last for first, last in ranges)]
    numbers = np.arange(len(kept))
    assert skips.to_positions(numbers).tolist() == kept
    assert skips.to_positions(numbers[:100].reshape(2, 50)).tolist() == [kept[:50], kept[50:100]]


@given(RANGES, st.integers(0, 100))
def test_kept_index_counts_the_kept_positions_before(ranges, position):
    kept = [p for p in range(position) if not any(first <= p <= last for first, last in ranges)]
    assert SkippedRanges(ranges).kept_index(position) == len(kept)


def test_without_ranges_all_positions_are_kept():
    assert SkippedRanges([]).to_positions(np.array([0, 5, 2**40])).tolist() == [0, 5, 2**40]
    assert SkippedRanges([]).kept_index(2**40) == 2**40
