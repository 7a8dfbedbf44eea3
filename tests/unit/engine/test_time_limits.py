"""No process group waits longer than ours do, whoever makes it: DeepSpeed passes no limit to the groups of ZeRO."""

import deepspeed
import torch
from torch.distributed import distributed_c10d

from megagpt.cluster import TIME_LIMIT


def limits():
    """Of all groups that this process is in."""
    groups = distributed_c10d._world.pg_map
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_groups_that_deepspeed_makes_have_our_limit(collectives):
    before = len(distributed_c10d._world.pg_map)
    deepspeed.comm.new_group([0])
    torch.distributed.new_group([0])
    assert len(distributed_c10d._world.pg_map) == before + 2
    assert limits() == {TIME_LIMIT}
