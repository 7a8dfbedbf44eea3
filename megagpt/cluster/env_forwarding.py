"""Environment variables that must be the same on all hosts, and the file from which DeepSpeed's launcher sets them.

By default DeepSpeed forwards only variables whose names begin with NCCL, PYTHON, MLFLOW, MV2 or UCX
(deepspeed/launcher/runner.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megagpt.errors import Problem, UserError

HOSTS_VARIABLE = "MEGAGPT_HOSTS"
"""Variable with the hosts of the hostfile, joined by "/".

Ranks that OpenMPI, MPICH or SLURM has started cannot read the hostfile itself.
"""

SSH_ALIVE = "-oServerAliveInterval=5 -oServerAliveCountMax=3"
"""Options for ssh. Without them, the pdsh that `deepspeed` starts waits forever for a host that has become silent."""

_NAMES = {HOSTS_VARIABLE, "DS_ACCELERATOR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_DEVICE_MAX_CONNECTIONS",
          "MEGAGPT_JOB"}  # fmt: skip
_PREFIXES = ("OMP_", "MKL_", "NCCL_", "TORCH_", "TORCHDYNAMO_", "PYTORCH_", "GLOO_", "MALLOC_", "HF_", "TOKENIZERS_",
             "FI_", "UCX_")  # fmt: skip
_HOST_SPECIFIC = re.compile(r"IFNAME|_HCA|_(DIR|HOME|PATH|CACHE|FILE)$")


def forwarded_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `env` that affect training and apply to every host, sorted by name."""
    return {name: env[name] for name in sorted(env) if name in _NAMES or name.startswith(_PREFIXES)}


def may_differ_per_host(name: str) -> bool:
    """Return True if a variable holds a path or a device name, which may be different on each host."""
    return bool(_HOST_SPECIFIC.search(name))


def deepspeed_env(env: Mapping[str, str]) -> str:
    """Return the content of a `.deepspeed_env` file with the forwarded variables of `env`.

    The file has one NAME=VALUE per line and nothing else, because DeepSpeed's launcher crashes on an empty line or a
    comment. The launcher inserts each value into a shell command, at best in double quotes. Raises UserError if the
    shell would change a value.
    """
    chosen = forwarded_variables(env)
    problems = [
        Problem(f"{name} cannot be forwarded: its value {value!r} has characters that a shell interprets",
                "the environment", f"unset {name}, or set it on each host")
        for name, value in chosen.items() if re.search(r"[\n\"$`\\]", value)
    ]  # fmt: skip
    if problems:
        raise UserError.from_problems(problems)
    return "".join(f"{name}={value}\n" for name, value in chosen.items() if value)
