"""From the environment to this process's place among all ranks, for every launcher; and agreement between ranks."""

from megagpt.cluster.collectives import TIME_LIMIT, Agreement
from megagpt.cluster.launch_env import Rank, free_port, from_environment, from_mpi_or_slurm

__all__ = ["TIME_LIMIT", "Agreement", "Rank", "free_port", "from_environment", "from_mpi_or_slurm"]
