"""Launch environment, rendezvous and collectives: how a process finds its rank, the other ranks, and agrees with them."""

from megagpt.distributed.agreement import TIME_LIMIT, Agreement
from megagpt.distributed.place import Rank, free_port, from_environment, from_mpi_or_slurm

__all__ = ["TIME_LIMIT", "Agreement", "Rank", "free_port", "from_environment", "from_mpi_or_slurm"]
