"""One pure function from the environment to this process's place, for each launcher."""

import pytest

from megagpt.distributed import Rank, check_world_size, from_environment
from megagpt.errors import UserError

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29611"}
TABLE = {
    "alone": ({}, Rank()),
    "deepspeed": (
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **ADDRESS},
        Rank(3, 1, 4, 2, "node1", 29611, "env"),
    ),
    "torchrun": (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **ADDRESS},
        Rank(0, 0, 2, 1, "node1", 29611, "env"),
    ),
    "mpirun, OpenMPI": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            **ADDRESS,
        },
        Rank(1, 0, 2, 1, "node1", 29611, "openmpi"),
    ),
    "mpirun, MPICH": (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **ADDRESS},
        Rank(1, 1, 2, 2, "node1", 29611, "mpich"),
    ),
    "srun": (
        {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", **ADDRESS},
        Rank(5, 1, 8, 8, "node1", 29611, "slurm"),
    ),
    "in an allocation, not by srun": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Rank()),
    "one rank by a launcher": ({"RANK": "0", "WORLD_SIZE": "1"}, Rank(launcher="env")),
}


@pytest.mark.parametrize("launcher", TABLE)
def test_each_launcher_is_understood(launcher):
    environment, expected = TABLE[launcher]
    assert from_environment(environment) == expected


def test_ranks_that_cannot_find_rank_0_are_told_what_to_set():
    with pytest.raises(UserError) as caught:
        from_environment({"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert str(caught.value) == (
        "megagpt: 2 ranks were started by mpich, but none knows where rank 0 listens\n"
        "  MASTER_ADDR is not set\n"
        "  do: export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT before the launcher starts the ranks"
    )


def test_all_five_variables_are_set_so_that_nobody_looks_for_mpi():
    variables = Rank().variables()
    assert set(variables) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert int(variables["MASTER_PORT"]) > 0


def test_another_world_than_promised_is_refused_with_both_numbers():
    check_world_size(Rank(), None)
    check_world_size(Rank(), 1)
    with pytest.raises(UserError) as caught:
        check_world_size(Rank(), 8)
    assert str(caught.value) == (
        "megagpt: 8 ranks were expected, 1 came\n"
        "  launcher: python, --expect-world-size 8\n"
        "  do: check the hostfile's path and slots, or the launcher's number of processes"
    )
