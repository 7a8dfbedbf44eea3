"""One uninterrupted run per session, which the interrupted ones are compared with."""

import pytest

from tests import training


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    training.finish(training.write_recipe(run, data))
    return run
