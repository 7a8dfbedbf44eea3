"""A run under a stream of random faults ends with the bits of one that was left alone."""

import pytest

from tests.faults.campaign import campaign, table
from tests.faults.drawn import repeated_and_lost


def test_no_token_is_lost_or_repeated_whatever_happens(data, tmp_path):
    out = campaign(25, seed=7, data=data, folder=tmp_path)
    assert out.wrong == [], table(out)
    assert (out.tokens_lost, out.tokens_repeated) == (0, 0)
    assert sum(out.faults.values()) == 25


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([4, 8, 12, 20], (0, 0)),  # what begins at 12 was left out on purpose
        ([4, 8, 8, 12, 20], (4, 0)),
        ([4, 12, 20], (0, 4)),
        ([5, 9, 13], (0, 12)),  # off by one: nothing is where it should be
    ],
)
def test_a_stream_with_a_fault_in_it_is_seen(positions, found):
    assert repeated_and_lost(positions, 4, left_out={12}) == found
