import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.skips import SkippedRanges

STRETCHES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)).map(lambda s: (s[0], s[0] + s[1])), max_size=6)


@given(STRETCHES)
def test_the_kept_positions_are_all_that_lie_in_no_stretch(stretches):
    skips = SkippedRanges(stretches)
    kept = [p for p in range(200) if not any(first <= p <= last for first, last in stretches)]
    numbers = np.arange(len(kept))
    assert skips.positions(numbers).tolist() == kept
    assert skips.positions(numbers[:100].reshape(2, 50)).tolist() == [kept[:50], kept[50:100]]


@given(STRETCHES, st.integers(0, 100))
def test_a_positions_number_counts_the_kept_ones_before_it(stretches, position):
    kept = [p for p in range(position) if not any(first <= p <= last for first, last in stretches)]
    assert SkippedRanges(stretches).number(position) == len(kept)


def test_without_stretches_nothing_moves():
    assert SkippedRanges([]).positions(np.array([0, 5, 2**40])).tolist() == [0, 5, 2**40]
    assert SkippedRanges([]).number(2**40) == 2**40
