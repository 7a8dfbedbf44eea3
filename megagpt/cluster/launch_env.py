"""One pure function from the environment to rank, local rank, world size, address and port, for every launcher."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.cluster import slurm_nodelist
from megagpt.errors import MachineError, UserError

_PORTS = range(20_000, 32_000)  # below those that Linux gives to connections, and to who asks for any
_FREE = range(10_000, 20_000, 2)  # below those of SLURM's jobs
_GIVEN = itertools.count()
_SPECIAL_STEP = 0xFFFF_FFF0  # steps from here on are SLURM's own: a batch script, an interactive shell


@dataclass(frozen=True)
class Rank:
    """This process among all of the job: `address:port` is where rank 0 listens.

    An empty address means that only MPI can tell it, port 0 that any free one will do. `job` is the launcher's own
    name of the job, the same on all its ranks, where it has one.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = "python"
    job: str = ""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that talks to the console and the disk."""
        return self.rank == 0

    def variables(self) -> dict[str, str]:
        """The five variables that torch and DeepSpeed read; all set, so that neither goes looking for MPI."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port or free_port()),
        }


@dataclass(frozen=True)
class _Variables:
    """What a launcher calls this process's place, and the job."""

    rank: str
    world: str
    local_rank: str
    local_world: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


# in the order in which they are believed: ranks of mpirun inherit SLURM's variables of the step that began its daemons
_LAUNCHERS = {
    "environment": _Variables(
        "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ("TORCHELASTIC_RUN_ID",)
    ),
    "openmpi": _Variables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",), ("PMIX_NAMESPACE",),
    ),
    "mpich": _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    "slurm": _Variables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", (), ("SLURM_JOB_ID", "SLURM_STEP_ID")),
}  # fmt: skip


def from_environment(env: Mapping[str, str]) -> Rank:
    """The place of this process, by its launcher's variables; alone where none is set.

    A pure function of `env`. Raises UserError where a launcher's variables are there but do not say enough.
    """
    launcher = next((name for name in _LAUNCHERS if _started(name, env)), None)
    if launcher is None:
        if _number(env, "WORLD_SIZE", 1) > 1:
            raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']}, but no variable says which rank this is", "RANK", _SET)
        return Rank()
    names = _LAUNCHERS[launcher]
    rank, size = _number(env, names.rank), _number(env, names.world)
    local_rank = _number(env, names.local_rank, 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise UserError(f"rank {rank} is none of {size} ranks", f"{names.rank}, {names.world}", _SET)
    address, port = _meeting_place(launcher, env, size)
    job = env.get("MEGAGPT_JOB") or ".".join(env[name] for name in names.job if name in env)
    return Rank(
        rank, local_rank, size, _local_size(launcher, env, size), address, port, _called(launcher, env), job
    )  # fmt: skip


def from_mpi_or_slurm(env: Mapping[str, str]) -> Rank:
    """The place among processes that mpirun or srun started together; alone where neither did. See above."""
    return from_environment({name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE")})


def job_port(job: str) -> int:
    """The port of a job by its number, so that two jobs that share a host do not share a port."""
    return _PORTS[int(job) % len(_PORTS)] if job.isdecimal() else 29_500


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, and not a batch script or a shell of an allocation."""
    return _number(env, "SLURM_STEP_ID", _SPECIAL_STEP) < _SPECIAL_STEP


def free_port() -> int:
    """A port on this host that nobody has now, and for the doctor the next one too. Raises MachineError.

    Nobody is given it by the system until rank 0 comes to listen there, which takes seconds. A process is given each
    port once, beginning far from where another does.
    """
    first = int(len(_FREE) * (os.getpid() * 0.618034 % 1))  # the golden ratio keeps neighbours apart
    for _ in _FREE:
        port = _FREE[(first + next(_GIVEN)) % len(_FREE)]
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise MachineError("no port is free on this host", f"{_FREE.start} to {_FREE.stop}", "see who listens: `ss -ltnp`")


_SET = "let the launcher set its variables, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def _started(launcher: str, env: Mapping[str, str]) -> bool:
    """Whether this launcher started this process."""
    if launcher == "slurm":
        return in_step(env)
    if launcher == "mpich" and in_step(env):
        return "MPI_LOCALRANKID" in env  # srun --mpi=pmi2 sets PMI_RANK too, but not this
    return _LAUNCHERS[launcher].rank in env


def _called(launcher: str, env: Mapping[str, str]) -> str:
    """The launcher's name for people."""
    if launcher != "environment":
        return launcher
    return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "LOCAL_SIZE" in env else launcher


def _meeting_place(launcher: str, env: Mapping[str, str], size: int) -> tuple[str, int]:
    """Where rank 0 listens: as the launcher says, else by SLURM's list of hosts and the job's number."""
    address, port = env.get("MASTER_ADDR", ""), _number(env, "MASTER_PORT", 0)
    if size == 1:
        return address or "127.0.0.1", port
    if launcher in ("openmpi", "mpich") and not address:
        return "", 0  # only MPI itself knows
    if launcher == "slurm":
        nodes = slurm_nodelist.hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
        address = address or next(iter(nodes), "")
    if not address:
        raise UserError(
            f"{size} ranks were started by {_called(launcher, env)}, but none knows where rank 0 listens",
            "MASTER_ADDR is not set",
            "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT before the launcher starts the ranks",
        )
    return address, port or job_port(env.get("SLURM_JOB_ID", ""))


def _local_size(launcher: str, env: Mapping[str, str], size: int) -> int:
    """The number of ranks on this host; all of them where the launcher does not say."""
    if launcher == "slurm":
        tasks = slurm_nodelist.counts(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
        node = _number(env, "SLURM_NODEID", 0)
        return tasks[node] if node < len(tasks) else size
    names = _LAUNCHERS[launcher].local_world
    return next((_number(env, name) for name in names if name in env), size)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable as a whole number; UserError where it is missing without a default, or is no number."""
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, where a number belongs" if text else f"{name} is not set", name, _SET)
    return int(text)
