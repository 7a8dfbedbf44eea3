"""From the environment to rank, world and address, for every launcher; and agreement between the ranks."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megagpt.errors import UserError

TIME_LIMIT = timedelta(minutes=30)  # of every process group: a dead peer ends the job, it never hangs it


@dataclass(frozen=True)
class Rank:
    """This process among all of the job: `address:port` is where rank 0 listens."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = "python"

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


# launcher: (rank, world size, local rank, local world size); the last may be absent
_VARIABLES = {
    "env": ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ()),
}  # fmt: skip


def from_environment(env: Mapping[str, str]) -> Rank:
    """The place of this process, by its launcher's variables; alone where none is set.

    A pure function of `env`. Raises UserError where a launcher's variables are there but do not say enough.
    """
    for launcher, (rank, world, local, local_worlds) in _VARIABLES.items():
        if rank not in env or world not in env:
            continue
        if launcher == "slurm" and ("SLURM_STEP_ID" not in env or env[world] == "1"):
            continue  # inside an allocation but not started by srun: one process
        size = int(env[world])
        local_size = next((int(env[name]) for name in local_worlds if name in env), size)
        address = env.get("MASTER_ADDR", "")
        if not address and size > 1:
            raise UserError(
                f"{size} ranks were started by {launcher}, but none knows where rank 0 listens",
                "MASTER_ADDR is not set",
                "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT before the launcher starts the ranks",
            )
        return Rank(
            rank=int(env[rank]),
            local_rank=int(env.get(local, "0")),
            world_size=size,
            local_world_size=local_size,
            address=address or "127.0.0.1",
            port=int(env.get("MASTER_PORT", "29500" if size > 1 else "0")),
            launcher=launcher,
        )
    return Rank()


def mpi_size(env: Mapping[str, str]) -> int:
    """How many processes mpirun or srun started together, this one included; 1 where neither did."""
    for launcher in ("openmpi", "mpich", "slurm"):
        _, world, _, _ = _VARIABLES[launcher]
        if world in env and not (launcher == "slurm" and "SLURM_STEP_ID" not in env):
            return int(env[world])
    return 1


def check_world_size(rank: Rank, expected: int | None) -> None:
    """Refuse to train on other ranks than were promised: a mistyped hostfile trains on one node."""
    if expected is not None and expected != rank.world_size:
        raise UserError(
            f"{expected} ranks were expected, {rank.world_size} came",
            f"launcher: {rank.launcher}, --expect-world-size {expected}",
            "check the hostfile's path and slots, or the launcher's number of processes",
        )


def free_port() -> int:
    """A port on this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Agreement:
    """Small numbers agreed between all ranks, over gloo: host memory only, no device is waited for."""

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        if world_size > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=TIME_LIMIT)

    def total(self, value: float) -> float:
        """The sum of `value` over the ranks (exact for whole numbers below 2^53)."""
        if self._group is None:
            return value
        import torch

        tensor = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return float(tensor.item())

    def totals(self, values: Sequence[int]) -> list[int]:
        """The sums of whole numbers over the ranks, modulo 2^64."""
        if self._group is None:
            return [value % (1 << 64) for value in values]
        import torch

        signed = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in values]
        tensor = torch.tensor(signed, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return [value % (1 << 64) for value in tensor.tolist()]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each whole number over the ranks, between -2^63 and 2^63."""
        if self._group is None:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor]

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order, on every rank."""
        if self._group is None:
            return [text]
        import torch.distributed

        texts = [""] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(texts, text, group=self._group)
        return texts

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it holds on at least one rank; one exchange for all."""
        return [count > 0 for count in self.totals([int(flag) for flag in flags])]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.total(0.0)


if __name__ == "__main__":  # for scripts that must name a port to a launcher
    print(free_port())
