"""One process group for all tests of the engine, since DeepSpeed remembers the first one."""

import pytest

from megagpt.cluster import Collectives, Rank
from megagpt.engine import init_deepspeed


@pytest.fixture(scope="session")
def collectives():
    init_deepspeed.start(Rank())
    yield Collectives(1)
    init_deepspeed.stop()
