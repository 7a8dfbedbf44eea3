"""Training over two real hosts by each launcher gives the curve of one process, which was never stopped."""

import re
import sys
import time

from tests.cluster.conftest import LENGTH, OPENMPI, SECONDS, said
from tests.training import command, wait_for_update

MPICH = ("mpirun.mpich", "-hosts", "node1,node2", "-n", "2", "-ppn", "1")
HANDED_ON = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TORCHDYNAMO_DISABLE")


def ranks(recipe, *words):
    """Return the command line of a rank, without its Python."""
    return command(recipe, *LENGTH, *words)[1:]


def test_deepspeed_with_a_hostfile_and_a_short_network_failure(cluster, deepspeed, recipe, same):
    launcher, env = deepspeed()
    training = cluster.start(1, *launcher, *ranks(recipe, "--expect-world-size", "2", "checkpoint.every=10"), **env)
    wait_for_update(recipe.with_suffix(""), 20, SECONDS)
    cluster.make("cut", "2")
    time.sleep(2)
    cluster.make("heal", "2")
    printed, _ = training.communicate()
    assert training.returncode == 0, printed
    assert "2 × CPU" in printed
    same()


def test_deepspeed_with_two_ranks_per_host(cluster, deepspeed, recipe, same):
    launcher, env = deepspeed(slots=2)
    assert "4 × CPU" in cluster.run(1, *launcher, *ranks(recipe), **env)
    same()


def test_deepspeed_by_openmpi(cluster, deepspeed, recipe, same):
    launcher, env = deepspeed()
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    cluster.run(1, *launcher, "--launcher", "openmpi", *ranks(recipe), **env)
    same()


def test_deepspeed_by_mpich_loses_the_exit_code_and_status_has_it(cluster, deepspeed, recipe, tmp_path):
    (launcher, env), run = deepspeed(), recipe.with_suffix("")
    mpirun = tmp_path / "bin/mpirun"  # a script instead of a link: MPICH's mpirun looks for its parts in its own folder
    mpirun.parent.mkdir()
    mpirun.write_text('#!/bin/sh\nexec mpirun.mpich "$@"\n')
    mpirun.chmod(0o755)
    env["PATH"] = f"{mpirun.parent}:{cluster.env['PATH']}"
    printed = cluster.run(1, *launcher, "--launcher", "mpich", *ranks(recipe, "--max-minutes", "0"), code=0, **env)
    assert "Stopped by the time limit; checkpoint saved at update 1" in printed
    said = cluster.run(1, "megagpt", "status", run, code=75)
    assert said == "stopped: checkpoint saved after the time limit; run the same command to resume\n"


def test_deepspeed_by_slurm(slurm, deepspeed, recipe, same):
    launcher, env = deepspeed()
    slurm.run(1, *launcher, "--launcher", "slurm", "--num_nodes", "2", *ranks(recipe), **env)
    same()


def test_deepspeed_without_ssh_once_on_each_host(cluster, deepspeed, recipe, same):
    launcher, _ = deepspeed()
    launcher = (*launcher, "--no_ssh", "--master_addr", "node1", "--node_rank")
    second = cluster.start(2, *launcher, "1", *ranks(recipe))
    cluster.run(1, *launcher, "0", *ranks(recipe))
    second.communicate()
    assert second.returncode == 0
    same()


def test_openmpi_broadcasts_the_address_of_rank_0(cluster, recipe, same):
    variables = [word for name in HANDED_ON for word in ("-x", name)]
    cluster.run(1, *OPENMPI, *variables, sys.executable, *ranks(recipe))
    same()


def test_mpich(cluster, recipe, same):
    place = ("-genv", "MASTER_ADDR", "node1", "-genv", "MASTER_PORT", "29611")
    cluster.run(1, *MPICH, *place, sys.executable, *ranks(recipe))
    same()


def test_two_worlds_of_one_rank_under_mpich_are_refused(cluster, recipe):
    """mpi4py's wheel does not find MPICH under the name that it expects, and loads OpenMPI, which sees one rank."""
    printed = cluster.run(1, *MPICH, "-prepend-rank", sys.executable, *ranks(recipe), code=2)
    assert [re.sub(r"(Open MPI v).+", r"\1…", message) for message in said(printed)] == [
        "megagpt: mpich started 2 ranks, but mpi4py sees a world size of 1\n"
        "  mpi4py has loaded Open MPI v…\n"
        "  do: export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv): "
        "then MPI is not needed"
    ]
    assert not recipe.with_suffix("").exists()
