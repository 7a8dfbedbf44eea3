"""Which device a rank trains on, and what it may ask of it. The decisions are pure functions, as no test has a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from megagpt.errors import MachineError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES by which people and SLURM say: none


def place(env: Mapping[str, str], local_rank: int, visible: int) -> int:
    """Which of the `visible` devices is this rank's. Raises MachineError where there are fewer than ranks.

    One alone is this rank's own if a variable says so: `srun --gpus-per-task=1` and wrappers of mpirun show each rank
    no other.
    """
    if visible == 1 and any(name in env for name in _VISIBLE):
        return 0
    if local_rank < visible:
        return local_rank
    raise MachineError(
        f"local rank {local_rank} has no device of its own: {visible} visible here",
        "CUDA_VISIBLE_DEVICES, the slots of the hostfile, or what the launcher was told",
        "start as many ranks on each host as it has devices",
    )


def variables(env: Mapping[str, str], place: int) -> dict[str, str]:
    """What DeepSpeed and torch take this rank's device from: ZeRO 3, pipelines and NCCL read LOCAL_RANK themselves."""
    mpi = "OMPI_COMM_WORLD_LOCAL_RANK"  # DeepSpeed insists that the two agree
    return {name: str(place) for name in ("LOCAL_RANK", mpi) if name != mpi or mpi in env}


def threads(env: Mapping[str, str], cores: int, ranks: int) -> int:
    """Threads for what a rank beside a GPU computes on the host, such as an offloaded optimizer.

    `cores` are those that it may use, with the other `ranks` of its host. What people set is kept; torchrun sets 1.
    """
    said = env.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and not (said == "1" and "TORCHELASTIC_RUN_ID" in env):
        return max(1, int(said))
    own = env.get("SLURM_CPUS_PER_TASK", "")  # SLURM has divided them already
    return max(1, int(own) if own.isdecimal() else cores // max(1, ranks))


def check_unused(env: Mapping[str, str], folder: Path = Path("/dev")) -> None:
    """Raises MachineError where GPUs are here that torch does not see, unless they are left idle on purpose."""
    idle = "DS_ACCELERATOR" in env or env.get("CUDA_VISIBLE_DEVICES", "all") in _HIDDEN
    here = [] if idle else list(folder.glob("nvidia[0-9]*"))
    if here:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        raise MachineError(
            f"{len(here)} × NVIDIA are here, but torch {torch.__version__}, {build}, sees none",
            "a driver older than torch's CUDA, or another build of torch",
            "install a torch that fits (launch/install.sh tells how), or export DS_ACCELERATOR=cpu to train on the CPU",
        )


def name() -> str:
    """This rank's device, for people."""
    kind = str(get_accelerator().device_name())
    if kind == "cpu":
        return f"CPU with {torch.get_num_threads()} threads"
    return str(torch.cuda.get_device_name()) if kind == "cuda" else kind


def computes(precision: str) -> bool:
    """Whether the device has units for this precision; what is done in software instead is many times slower."""
    if precision == "fp16":
        return bool(get_accelerator().is_fp16_supported())
    if precision == "bf16" and get_accelerator().device_name() == "cuda":
        # DeepSpeed and torch say yes to any GPU: they count what the compiler emulates
        return bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0)
    return True


def peak_memory() -> int | None:
    """The most bytes that this rank's tensors have taken on its device; None on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return None
    return int(get_accelerator().max_memory_allocated())
