"""Launch environment, rendezvous and collectives, with which a process finds its rank and the other ranks."""

from megagpt.cluster.collectives import TIME_LIMIT, Collectives
from megagpt.cluster.launch_env import Rank, free_port, from_environment, from_mpi_or_slurm

__all__ = ["TIME_LIMIT", "Collectives", "Rank", "free_port", "from_environment", "from_mpi_or_slurm"]
