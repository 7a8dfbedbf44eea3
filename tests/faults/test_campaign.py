"""A run under a stream of random faults ends with the bits of one that was left alone."""

from tests.faults.campaign import campaign


def test_no_token_is_lost_or_repeated_whatever_happens(request, data, tmp_path):
    faults = 25 if request.config.getoption("--full") else 3
    outcome = campaign(faults, seed=7, data=data, folder=tmp_path)
    assert outcome.wrong == []
    assert sum(outcome.faults.values()) == faults
