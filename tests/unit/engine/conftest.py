"""One process group for all tests of the room: DeepSpeed remembers the first one it sees."""

import pytest

from megagpt.distributed import Collectives, Rank
from megagpt.engine import start


@pytest.fixture(scope="session")
def collectives():
    start.start(Rank())
    yield Collectives(1)
    start.stop()
