"""One process group for all tests of this folder, because DeepSpeed keeps the first one."""

import pytest

from megagpt.distributed import Agreement, Rank
from megagpt.engine import start


@pytest.fixture(scope="session")
def agreement():
    start.start(Rank())
    yield Agreement(1)
    start.stop()
