"""Problems on two real hosts are refused, or end the job everywhere, and the rank and host are named."""

import re
import sys
import time

from megagpt.cluster import env_forwarding
from megagpt.training import status
from tests import training
from tests.cluster.conftest import LENGTH, OPENMPI, SECONDS, said
from tests.training import command, events, wait_for_update


def ranks(recipe, *words):
    """Return the command line of a rank, without its Python."""
    return command(recipe, *words)[1:]


def test_a_mistyped_hostfile_trains_nothing(cluster, deepspeed, recipe):
    (name, option, hosts, *more), env = deepspeed()
    printed = cluster.run(1, name, option, f"{hosts}x", *more, *ranks(recipe, *LENGTH), code=2, **env)
    assert said(printed) == [
        "megagpt: the hostfile does not exist, so DeepSpeed started 1 rank on this host only\n"
        f"  deepspeed --hostfile {hosts}x\n"
        "  do: correct the path of the hostfile; to train on this host only, leave out --hostfile"
    ]
    assert not recipe.with_suffix("").exists()


ON_ONE = (
    "megagpt: deepspeed was given 2 hosts, node1, node2, but the job's 2 ranks run on 1: node1\n"
    "  the hostfile\n  do: check which host each name of the hostfile leads to (`ssh NAME hostname`); "
    "--launcher slurm also needs --num_nodes, --no_ssh needs one launcher on each host"
)


def test_two_launchers_on_one_host_are_refused_with_both_names(cluster, deepspeed, recipe):
    launcher, _ = deepspeed()
    launcher = (*launcher, "--no_ssh", "--master_addr", "node1", "--node_rank")
    second = cluster.start(1, *launcher, "1", *ranks(recipe))
    printed = cluster.run(1, *launcher, "0", *ranks(recipe), code=2)
    second.communicate()
    assert second.returncode == 2
    assert said(printed) == [ON_ONE]


def test_slurm_that_puts_both_ranks_on_one_host_is_refused_with_both_names(slurm, deepspeed, recipe):
    launcher, env = deepspeed()
    printed = slurm.run(1, *launcher, "--launcher", "slurm", *ranks(recipe), code=2, **env)
    assert said(printed) == [ON_ONE]


def test_variables_that_do_not_reach_the_other_host_are_named(cluster, recipe):
    """mpirun forwards only the variables of its -x options."""
    unset = [word for name in env_forwarding.forwarded_variables(cluster.env) for word in ("-u", name)]
    environment = ("env", *unset, "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1")
    printed = cluster.run(
        1, *environment, *OPENMPI, "--tag-output", "-x", "PYTHONPATH", sys.executable, *ranks(recipe), code=2
    )
    assert said(printed) == [
        "megagpt: 2 environment variables differ between ranks\n"
        "  DS_ACCELERATOR: cpu on rank 0 (node1), not set on rank 1 (node2)\n"
        "  OMP_NUM_THREADS: 1 on rank 0 (node1), not set on rank 1 (node2)\n"
        "  do: forward it (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"
    ]


def test_two_jobs_on_one_port_never_join_and_a_killed_rank_is_named(cluster, deepspeed, data, recipe, tmp_path):
    (launcher, env), run = deepspeed(), recipe.with_suffix("")
    first = cluster.start(1, *launcher, "--master_port", "29700", *ranks(recipe, "length.updates=1000000"), **env)
    wait_for_update(run, 10, SECONDS)
    other = training.write_recipe(tmp_path / "other", data)
    printed = cluster.run(1, *launcher, "--master_port", "29700", *ranks(other, *LENGTH), code=1, **env)
    do = "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT"
    assert said(printed) == [
        "megagpt: port 29700 is in use on this host, by another job or by processes left from an earlier one\n"
        f"  rank 0, launcher: deepspeed, MASTER_PORT\n{do}; `ss -ltnp` shows which program listens",
        f"megagpt: two jobs share the port 29700 of 10.77.0.1: {run} listens there, this is {tmp_path}/other\n"
        f"  rank 1, launcher: deepspeed\n{do}",
    ]
    assert first.poll() is None
    cluster.run(2, "kill", "-9", *cluster.ranks(2))
    printed, _ = first.communicate()
    assert first.returncode != 0
    assert re.search(r"megagpt: rank 0 failed in .+ of update \d+: ", printed), printed
    gone = r"megagpt: rank 0 failed without\n(?:node1: )?  rank 1 on node2: .+ of update \d+  silent for \d+ s: stopped"
    assert re.search(gone, printed), printed
    assert "rank 1 on node2" in status.read(run).why
    assert [cluster.ranks(1), cluster.ranks(2)] == [[], []]


def test_a_cut_cable_ends_the_job_on_every_host_and_it_resumes_from_its_checkpoint(cluster, deepspeed, recipe):
    (launcher, env), run = deepspeed(), recipe.with_suffix("")
    limit = 5
    words = ("length.updates=1000000", "checkpoint.every=20", f"log.hang_after={limit}")
    training = cluster.start(1, *launcher, *ranks(recipe, *words), **env)
    try:
        wait_for_update(run, 50, SECONDS)
        assert status.read(run).state == "running"
        cluster.make("cut", "2")
        begun = time.monotonic()
        printed, _ = training.communicate()
        while cluster.processes():
            time.sleep(0.1)
        assert time.monotonic() - begun < limit + 30  # the time limit that is promised; usually it takes 20 s
    finally:
        cluster.make("heal", "2")
    assert training.returncode != 0, printed
    assert re.search(r"megagpt: rank 0 on node1 has made no progress for \d+ s, in phase .+ of update \d+\n", printed)
    assert "  host node2 (10.77.0.2) does not answer: its network is cut, or it is down\n" in printed
    assert "host node2 (10.77.0.2) does not answer" in cluster.run(1, "megagpt", "status", run, code=1)
    cluster.run(1, *launcher, *ranks(recipe, *words, "--max-minutes", "0.01", "--resume", "must"), code=75, **env)
    assert [event["event"] for event in events(run)].count("resume") == 1
    assert status.read(run).code == 75
