"""Initialize DeepSpeed in this process, with reduced logging, a timeout, and only the operators that training needs."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from megagpt.cluster import TIME_LIMIT, Rank
from megagpt.engine import deepspeed_patches, devices


def start(rank: Rank) -> str:
    """Join the job's process group and select this rank's device. Call this once, before building an engine.

    Returns:
        A readable name of the device.
    """
    os.environ.update(rank.env_variables())
    for name in ("DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        devices.check_unused_gpus(os.environ)
        deepspeed_patches.skip_shared_memory_operator()
    else:
        index = devices.device_index(os.environ, rank.local_rank, accelerator.device_count())
        os.environ.update(devices.device_env(os.environ, index))
        accelerator.set_device(index)  # must precede all allocations and the start of NCCL
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(devices.host_threads(os.environ, cores, rank.local_world_size))
    deepspeed_patches.set_default_group_timeout(TIME_LIMIT)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=TIME_LIMIT, verbose=False)
    return devices.device_name()


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
