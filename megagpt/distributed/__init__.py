"""Launch environment, rendezvous and collectives: how a process finds its rank and the other ranks."""

from megagpt.distributed.agreement import TIME_LIMIT, Agreement
from megagpt.distributed.place import Rank, free_port, from_environment, from_mpi_or_slurm

__all__ = ["TIME_LIMIT", "Agreement", "Rank", "free_port", "from_environment", "from_mpi_or_slurm"]
