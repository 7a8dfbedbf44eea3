"""One process group for all tests of this folder, because DeepSpeed keeps the first one."""

import pytest

from megagpt.cluster import Agreement, Rank
from megagpt.engine import init_deepspeed


@pytest.fixture(scope="session")
def agreement():
    init_deepspeed.start(Rank())
    yield Agreement(1)
    init_deepspeed.stop()
