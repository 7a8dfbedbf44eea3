"""One process group for all tests of the room: DeepSpeed remembers the first one it sees."""

import pytest

from megagpt.distributed import Agreement, Rank
from megagpt.engine import start


@pytest.fixture(scope="session")
def agreement():
    start.start(Rank())
    yield Agreement(1)
    start.stop()
