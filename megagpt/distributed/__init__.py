"""From the environment to this process's place among all ranks, for every launcher; and collectives between ranks."""

from megagpt.distributed.agreement import TIME_LIMIT, Collectives
from megagpt.distributed.place import Rank, free_port, from_environment, from_mpi_or_slurm

__all__ = ["TIME_LIMIT", "Collectives", "Rank", "free_port", "from_environment", "from_mpi_or_slurm"]
