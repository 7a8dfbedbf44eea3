"""Start DeepSpeed in this process: quiet, without compiled operators that training does not need, with a time limit."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from megagpt.cluster import TIME_LIMIT, Rank
from megagpt.engine import devices


def start(rank: Rank) -> str:
    """Join the job's process group; the name of this rank's device. Call once, before anything is built."""
    os.environ.update(rank.env_variables())
    for name in ("DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        devices.check_unused(os.environ)
        # only inference uses it, and gloo start-up would compile it for minutes (deepspeed/comm/torch.py). Set without
        # a look at the others: to look is to run the C compiler, half a second at every start.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    else:
        place = devices.place(os.environ, rank.local_rank, accelerator.device_count())
        os.environ.update(devices.variables(os.environ, place))
        accelerator.set_device(place)  # before anything is allocated, or NCCL begins
        torch.set_num_threads(devices.threads(os.environ, len(os.sched_getaffinity(0)), rank.local_world_size))
    # DeepSpeed makes its own groups, those of ZeRO among them, without a limit, and torch then takes these
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, TIME_LIMIT)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=TIME_LIMIT, verbose=False)
    return devices.name()


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
