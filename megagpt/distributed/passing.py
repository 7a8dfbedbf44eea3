"""Variables that must be alike on all hosts: the list of those that are handed on, and the file that DeepSpeed reads.

DeepSpeed itself hands on names that begin with NCCL, PYTHON, MLFLOW, MV2 or UCX only (deepspeed/launcher/runner.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megagpt.errors import Problem, UserError

HOSTS = (
    "MEGAGPT_HOSTS"  # those of the hostfile, with `/` between: under openmpi, mpich and slurm no rank sees that file
)
_WHOLE = {HOSTS, "DS_ACCELERATOR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_DEVICE_MAX_CONNECTIONS", "MEGAGPT_JOB"}
_PREFIXES = ("OMP_", "MKL_", "NCCL_", "TORCH_", "TORCHDYNAMO_", "PYTORCH_", "GLOO_", "MALLOC_", "HF_", "TOKENIZERS_",
             "FI_", "UCX_")  # fmt: skip
_PLACES = re.compile(r"IFNAME|_HCA|_(DIR|HOME|PATH|CACHE|FILE)$")
# the pdsh of `deepspeed` waits for ever for a host that falls silent, unless its ssh asks for a sign of life
SSH_ALIVE = "-oServerAliveInterval=5 -oServerAliveCountMax=3"


def passed_on(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that training depends on, and that hold on every host alike, by name."""
    return {name: env[name] for name in sorted(env) if name in _WHOLE or name.startswith(_PREFIXES)}


def of_a_host(name: str) -> bool:
    """Whether a variable names a place or device, which each host may call otherwise."""
    return bool(_PLACES.search(name))


def deepspeed_env(env: Mapping[str, str]) -> str:
    """The text of a `.deepspeed_env` with the variables of `env` that are handed on.

    One NAME=VALUE a line and nothing else: on an empty line or a comment DeepSpeed's launcher dies. Raises UserError
    where a value would reach the other hosts changed: the launcher puts it into a shell, between double quotes at best.
    """
    chosen = passed_on(env)
    bad = [
        Problem(f"{name} cannot be handed on: its value {value!r} means something to a shell", "the environment",
                f"unset {name}, or set it on each host")
        for name, value in chosen.items() if re.search(r"[\n\"$`\\]", value)
    ]  # fmt: skip
    if bad:
        raise UserError.from_problems(bad)
    return "".join(f"{name}={value}\n" for name, value in chosen.items() if value)
