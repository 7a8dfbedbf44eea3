"""Launch environment, from which a process reads its rank, the world size and the address of rank 0.

Each supported launcher sets different variables.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.cluster import slurm_nodelist
from megagpt.errors import MachineError, UserError

# Range of the ports that `job_port` returns. It lies below the ephemeral ports of Linux.
_JOB_PORTS = range(20_000, 32_000)
# Range of the ports that `free_port` returns. It lies below the ports of `job_port`.
_FREE_PORTS = range(10_000, 20_000, 2)
_CALLS = itertools.count()
# SLURM reserves step numbers from this one on for batch scripts and interactive shells.
_SPECIAL_STEP = 0xFFFF_FFF0


@dataclass(frozen=True)
class Rank:
    """Rank of this process, and the address of rank 0."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "127.0.0.1"
    """address of rank 0; empty if it must be obtained from MPI"""
    port: int = 0
    """port on which rank 0 listens; 0 selects any free port"""
    launcher: str = "python"
    job: str = ""
    """the launcher's identifier of the job, which is the same on all ranks; empty if the launcher sets none"""

    @property
    def main(self) -> bool:
        """True on rank 0, which writes to the console and the run directory."""
        return self.rank == 0

    def env_variables(self) -> dict[str, str]:
        """Return the five variables that torch and DeepSpeed read. If one is missing, DeepSpeed tries to use MPI."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port or free_port()),
        }


@dataclass(frozen=True)
class _LauncherVariables:
    """Names of the environment variables in which a launcher passes the rank, the sizes and the job."""

    rank: str
    world: str
    local_rank: str
    local_world: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


# Launchers in order of precedence. Ranks of mpirun inherit the variables of the SLURM step that started its daemons, so
# SLURM must come last.
_LAUNCHERS = {
    "environment": _LauncherVariables(
        "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ("TORCHELASTIC_RUN_ID",)
    ),
    "openmpi": _LauncherVariables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",), ("PMIX_NAMESPACE",),
    ),
    "mpich": _LauncherVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    "slurm": _LauncherVariables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", (), ("SLURM_JOB_ID", "SLURM_STEP_ID")),
}  # fmt: skip


def from_environment(env: Mapping[str, str]) -> Rank:
    """Return the rank of this process from the variables of its launcher, or rank 0 of 1 if there is no launcher.

    The result depends on `env` only. Raises UserError if variables of the launcher are missing or invalid.
    """
    launcher = next((name for name in _LAUNCHERS if _is_launcher(name, env)), None)
    if launcher is None:
        if _number(env, "WORLD_SIZE", 1) > 1:
            raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']}, but the rank of this process is not set", "RANK", _DO)
        return Rank()
    names = _LAUNCHERS[launcher]
    rank, size = _number(env, names.rank), _number(env, names.world)
    local_rank = _number(env, names.local_rank, 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise UserError(f"rank {rank} is not below the world size {size}", f"{names.rank}, {names.world}", _DO)
    address, port = _rendezvous_address(launcher, env, size)
    job = env.get("MEGAGPT_JOB") or ".".join(env[name] for name in names.job if name in env)
    return Rank(
        rank, local_rank, size, _local_size(launcher, env, size), address, port, _display_name(launcher, env), job
    )  # fmt: skip


def from_mpi_or_slurm(env: Mapping[str, str]) -> Rank:
    """Return the rank of this process as `from_environment` does, but only if mpirun or srun started it."""
    return from_environment({name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE")})


def job_port(job: str) -> int:
    """Return a port that depends on the number of a SLURM job, so that two jobs on one host use different ports."""
    return _JOB_PORTS[int(job) % len(_JOB_PORTS)] if job.isdecimal() else 29_500


def is_slurm_step(env: Mapping[str, str]) -> bool:
    """Return True if srun started this process, and False in a batch script or an interactive shell."""
    return _number(env, "SLURM_STEP_ID", _SPECIAL_STEP) < _SPECIAL_STEP


def free_port() -> int:
    """Return a free port on this host. The next higher port, which the doctor uses, is free as well.

    The port is outside the ephemeral range, so the system does not assign it to another program before rank 0 listens
    on it. A process returns each port only once, and different processes begin their search at different ports.
    Raises MachineError if no port is free.
    """
    # Multiplying by the golden ratio makes processes with similar ids begin at distant ports.
    first = int(len(_FREE_PORTS) * (os.getpid() * 0.618034 % 1))
    for _ in _FREE_PORTS:
        port = _FREE_PORTS[(first + next(_CALLS)) % len(_FREE_PORTS)]
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise MachineError(
        "no port is free on this host",
        f"{_FREE_PORTS.start} to {_FREE_PORTS.stop}",
        "see which programs listen: `ss -ltnp`",
    )


_DO = "let the launcher set its variables, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def _is_launcher(launcher: str, env: Mapping[str, str]) -> bool:
    """Return True if `launcher` started this process."""
    if launcher == "slurm":
        return is_slurm_step(env)
    if launcher == "mpich" and is_slurm_step(env):
        return "MPI_LOCALRANKID" in env  # `srun --mpi=pmi2` sets PMI_RANK, too, but not this variable.
    return _LAUNCHERS[launcher].rank in env


def _display_name(launcher: str, env: Mapping[str, str]) -> str:
    if launcher != "environment":
        return launcher
    return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "LOCAL_SIZE" in env else launcher


def _rendezvous_address(launcher: str, env: Mapping[str, str], size: int) -> tuple[str, int]:
    """Return address and port of rank 0 from the launcher's variables, or from SLURM's host list and job number."""
    address, port = env.get("MASTER_ADDR", ""), _number(env, "MASTER_PORT", 0)
    if size == 1:
        return address or "127.0.0.1", port
    if launcher in ("openmpi", "mpich") and not address:
        return "", 0  # They must be obtained from MPI.
    if launcher == "slurm":
        nodes = slurm_nodelist.expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
        address = address or next(iter(nodes), "")
    if not address:
        raise UserError(
            f"{_display_name(launcher, env)} started {size} ranks, but the address of rank 0 is not known",
            "MASTER_ADDR is not set",
            "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT before the launcher starts the ranks",
        )
    return address, port or job_port(env.get("SLURM_JOB_ID", ""))


def _local_size(launcher: str, env: Mapping[str, str], size: int) -> int:
    """Return the number of ranks on this host, or the world size if the launcher does not set it."""
    if launcher == "slurm":
        tasks = slurm_nodelist.expand_counts(
            env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
        )
        node = _number(env, "SLURM_NODEID", 0)
        return tasks[node] if node < len(tasks) else size
    names = _LAUNCHERS[launcher].local_world
    return next((_number(env, name) for name in names if name in env), size)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable as an integer. Raises UserError if it is not a number, or if it is missing without default."""
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a number" if text else f"{name} is not set", name, _DO)
    return int(text)
