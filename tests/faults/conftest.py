"""One uninterrupted run per session, with which interrupted runs are compared."""

import pytest

from tests import training


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    training.finish(training.write_recipe(run, data))
    return run
