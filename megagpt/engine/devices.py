"""Select the device that a rank trains on, and query its capabilities.

The functions that select a device depend only on their arguments, so they can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from megagpt.errors import MachineError

_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# These values of CUDA_VISIBLE_DEVICES hide all GPUs. SLURM sets "NoDevFiles".
_NO_DEVICES = ("", "-1", "NoDevFiles")


def device_index(env: Mapping[str, str], local_rank: int, visible: int) -> int:
    """Return the index of this rank's device among the visible ones.

    If only one device is visible and an environment variable restricts the process to it, that device belongs to this
    rank. `srun --gpus-per-task=1` and some wrappers of mpirun hide the devices of the other ranks in this way.

    Args:
        env: The environment of the process.
        local_rank: Index of the rank on its host.
        visible: Number of devices that are visible to the process.

    Raises:
        MachineError: If there are fewer devices than ranks on this host.
    """
    if visible == 1 and any(name in env for name in _VISIBLE_DEVICES):
        return 0
    if local_rank < visible:
        return local_rank
    raise MachineError(
        f"local rank {local_rank} has no device of its own: it sees {visible}",
        "CUDA_VISIBLE_DEVICES, the slots of the hostfile, or the number of ranks given to the launcher",
        "start as many ranks on each host as it has devices",
    )


def device_env(env: Mapping[str, str], index: int) -> dict[str, str]:
    """Return the environment variables from which DeepSpeed and torch read the index of this rank's device.

    DeepSpeed's ZeRO-3, its pipelines and NCCL all read LOCAL_RANK. DeepSpeed also requires that OpenMPI's variable, if
    it is set, has the same value (deepspeed/comm/comm.py).
    """
    changed = {"LOCAL_RANK": str(index)}
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:
        changed["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    return changed


def host_threads(env: Mapping[str, str], cores: int, ranks: int) -> int:
    """Return the number of CPU threads of a rank with a GPU. An offloaded optimizer, for example, uses them.

    An explicit OMP_NUM_THREADS is respected, except for torchrun's default of 1.

    Args:
        env: The environment of the process.
        cores: Cores that the process may use, shared by all ranks of the host.
        ranks: Number of ranks on this host.
    """
    explicit = env.get("OMP_NUM_THREADS", "")
    if explicit.isdecimal() and not (explicit == "1" and "TORCHELASTIC_RUN_ID" in env):
        return max(1, int(explicit))
    per_task = env.get("SLURM_CPUS_PER_TASK", "")  # the number of cores per rank, as divided by SLURM
    return max(1, int(per_task) if per_task.isdecimal() else cores // max(1, ranks))


def check_unused_gpus(env: Mapping[str, str], folder: Path = Path("/dev")) -> None:
    """Check that training does not run on the CPU by mistake on a host with GPUs.

    Args:
        env: The environment of the process. GPUs may be left idle on purpose with DS_ACCELERATOR or
            CUDA_VISIBLE_DEVICES.
        folder: Folder with the device files of the GPUs.

    Raises:
        MachineError: If the host has GPUs that torch does not detect.
    """
    if "DS_ACCELERATOR" in env or env.get("CUDA_VISIBLE_DEVICES", "all") in _NO_DEVICES:
        return
    gpus = list(folder.glob("nvidia[0-9]*"))
    if gpus:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        raise MachineError(
            f"this host has {len(gpus)} NVIDIA {'GPU' if len(gpus) == 1 else 'GPUs'}, "
            f"but torch {torch.__version__}, {build}, sees none",
            "the driver is older than torch's CUDA, or this is the wrong build of torch",
            "install a matching torch (see launch/install.sh), or export DS_ACCELERATOR=cpu to train on the CPU",
        )


def device_name() -> str:
    """Return a readable name of this rank's device."""
    kind = str(get_accelerator().device_name())
    if kind == "cpu":
        return f"CPU with {torch.get_num_threads()} threads"
    return str(torch.cuda.get_device_name()) if kind == "cuda" else kind


def supports_precision(precision: str) -> bool:
    """Return whether the hardware of the device supports this precision. Emulation would be many times slower."""
    if precision == "fp16":
        return bool(get_accelerator().is_fp16_supported())
    if precision == "bf16" and get_accelerator().device_name() == "cuda":
        # DeepSpeed and torch report bf16 as supported on every GPU, because the compiler can emulate it.
        return bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0)
    return True


def peak_memory() -> int | None:
    """Return the peak number of bytes allocated for tensors on this rank's device, or None on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return None
    return int(get_accelerator().max_memory_allocated())
