"""Training over two real hosts, by each launcher, gives the curve of one process; faults end it, and it resumes."""

import sys

import pytest

from megagpt.run import status
from tests.cluster.conftest import LENGTH
from tests.training import command, events, wait_for_update

MPI = ("mpirun", "--allow-run-as-root", "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
       "-host", "node1,node2", "-n", "2")  # fmt: skip


@pytest.fixture
def deepspeed(cluster, tmp_path):
    """The start of a command line of DeepSpeed's launcher for two hosts of one rank, and its environment."""
    hosts, environment = tmp_path / "hosts", tmp_path / "environment"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    cluster.run(1, "megagpt", "hosts", hosts, "--write-environment", environment)
    return ("deepspeed", "--hostfile", hosts, "--no_local_rank"), {"DS_ENV_FILE": str(environment)}


def ranks(recipe, *words):
    """The command line of a rank, without its Python."""
    return command(recipe, *words)[1:]


def test_deepspeed_with_a_hostfile(cluster, deepspeed, recipe, same):
    launcher, env = deepspeed
    printed = cluster.run(1, *launcher, *ranks(recipe, *LENGTH, "--expect-world-size", "2"), **env)
    assert "2 × CPU" in printed
    same()


def test_a_mistyped_hostfile_trains_nothing(cluster, deepspeed, recipe):
    (name, option, hosts, *more), env = deepspeed
    printed = cluster.run(1, name, option, f"{hosts}x", *more, *ranks(recipe, *LENGTH), code=2, **env)
    assert "the hostfile is not there, so that DeepSpeed took this host alone: 1 ranks on 1 host" in printed
    assert not recipe.with_suffix("").exists()


def test_a_cut_cable_ends_the_job_on_every_host_and_it_goes_on_from_its_checkpoint(cluster, deepspeed, recipe):
    (launcher, env), run = deepspeed, recipe.with_suffix("")
    words = ("length.updates=1000000", "checkpoint.every=20", "log.hang_after=5")
    training = cluster.start(1, *launcher, *ranks(recipe, *words), **env)
    try:
        wait_for_update(run, 50)
        assert status.read(run).state == "running"
        cluster.make("cut", "2")
        printed, _ = training.communicate(timeout=120)
    finally:
        training.kill()
        cluster.make("heal", "2")
    assert training.returncode != 0, printed
    assert "has made no progress for" in printed
    assert [cluster.ranks(1), cluster.ranks(2)] == [[], []]
    cluster.run(1, "megagpt", "status", run, code=1)
    cluster.run(1, *launcher, *ranks(recipe, *words, "--max-minutes", "0.01", "--resume", "must"), code=75, **env)
    assert [event["event"] for event in events(run)].count("resume") == 1
    assert status.read(run).code == 75


def test_mpirun_finds_rank_0_by_mpi(cluster, recipe, same):
    variables = ("-x", "PYTHONPATH", "-x", "DS_ACCELERATOR", "-x", "OMP_NUM_THREADS")
    cluster.run(1, *MPI, *variables, sys.executable, *ranks(recipe, *LENGTH))
    same()


def test_torchrun_goes_on_with_the_host_that_is_left(cluster, recipe, same):
    def torchrun(host):
        conf = f"last_call_timeout=5,join_timeout=60,is_host={int(host == 1)}"
        return cluster.start(
            host, "torchrun", "--nnodes", "1:2", "--max-restarts", "3", "--nproc_per_node", "1",
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29400", "--rdzv_id", "j1", "--rdzv_conf", conf,
            *ranks(recipe, *LENGTH, "log.hang_after=5", "checkpoint.every=10"),
        )  # fmt: skip

    first, second = torchrun(1), torchrun(2)
    try:
        wait_for_update(recipe.with_suffix(""), 11)
        cluster.make("off", "2")
        printed, _ = first.communicate(timeout=240)
    finally:
        for process in (first, second):
            process.kill()
            process.stdout.close()
        cluster.make("boot", "2")
    assert first.returncode == 0, printed
    assert "2 × CPU" in printed
    assert "1 × CPU" in printed
    same()
