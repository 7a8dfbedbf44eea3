"""Every process group has our timeout, whoever creates it. DeepSpeed passes none for the groups of ZeRO.

See deepspeed_patches.set_default_group_timeout.
"""

import deepspeed
import torch
from torch.distributed import distributed_c10d

from megagpt.cluster import TIME_LIMIT


def limits():
    """Return the timeouts of all groups of this process."""
    groups = distributed_c10d._world.pg_map
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_groups_that_deepspeed_creates_have_our_timeout(collectives):
    before = len(distributed_c10d._world.pg_map)
    deepspeed.comm.new_group([0])
    torch.distributed.new_group([0])
    assert len(distributed_c10d._world.pg_map) == before + 2
    assert limits() == {TIME_LIMIT}
