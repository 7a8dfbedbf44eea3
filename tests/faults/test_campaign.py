"""A run under a series of random faults ends with the same bits as one without faults."""

import pytest

from tests.faults.campaign import campaign, table
from tests.faults.drawn import repeated_and_lost


def test_no_token_is_lost_or_repeated_under_random_faults(data, tmp_path):
    out = campaign(25, seed=7, data=data, folder=tmp_path)
    assert out.wrong == [], table(out)
    assert (out.tokens_lost, out.tokens_repeated) == (0, 0)
    assert sum(out.faults.values()) == 25


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([4, 8, 12, 20], (0, 0)),  # the update at 12 was skipped on purpose
        ([4, 8, 8, 12, 20], (4, 0)),
        ([4, 12, 20], (0, 4)),
        ([5, 9, 13], (0, 12)),  # off by one: no sample is where it should be
    ],
)
def test_lost_and_repeated_samples_are_counted(positions, found):
    assert repeated_and_lost(positions, 4, left_out={12}) == found
