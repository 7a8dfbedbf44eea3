"""Real processes on one port: the ranks of a job meet, and those of another job never join them."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from megagpt.cluster import free_port

WORKER = Path(__file__).parent / "rendezvous_worker.py"


@contextmanager
def process(rank, name, port, world=2, seconds=60, **more):
    """One rank of a job of two, and its first words on demand; killed at the end."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    started = subprocess.Popen(
        [sys.executable, str(WORKER), name, str(seconds)],
        env={**os.environ, **place, "MASTER_PORT": str(port), **more},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_two_jobs_on_one_port_never_join_and_the_first_goes_on():
    port = free_port()
    with ExitStack() as stack:
        first = [stack.enter_context(process(0, "runs/a", port))]
        # rank 1 of the other job comes before rank 1 of the first: the place is free, and must not be taken
        intruder = stack.enter_context(process(1, "runs/b", port))
        words, _ = intruder.communicate(timeout=180)
        assert intruder.returncode == 1
        assert words == (
            f"megagpt: two jobs share the port {port} of 127.0.0.1: runs/a listens there, this is runs/b\n"
            "  rank 1, launcher: environment\n"
            "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT\n"
        )
        second = stack.enter_context(process(0, "runs/b", port))
        words, _ = second.communicate(timeout=180)
        assert second.returncode == 1
        assert words.startswith(f"megagpt: port {port} is in use on this host: by another job, or by what is left of")
        first.append(stack.enter_context(process(1, "runs/a", port)))
        assert [one.stdout.readline() for one in first] == ["met as rank 0\n", "met as rank 1\n"]
        # the same job started twice: its names are equal, its places are taken
        double = stack.enter_context(process(1, "runs/a", port))
        words, _ = double.communicate(timeout=180)
        assert words.startswith(f"megagpt: two processes are rank 1 of the job at 127.0.0.1:{port}\n")
        assert [one.poll() for one in first] == [None, None]


def test_the_launchers_own_name_of_the_job_tells_two_apart_that_write_to_one_place():
    port = free_port()
    with process(0, "runs/a", port, MEGAGPT_JOB="7"), process(1, "runs/a", port, MEGAGPT_JOB="8") as other:
        assert "runs/a (job 7) listens there, this is runs/a (job 8)" in other.communicate(timeout=180)[0]


def test_ranks_that_do_not_come_are_named():
    with process(0, "runs/a", free_port(), world=3, seconds=3) as alone:
        words, _ = alone.communicate(timeout=180)
    assert alone.returncode == 1
    assert words == (
        "megagpt: 2 of 3 ranks have not come in 3 s\n  rank 1, 2\n"
        "  do: see what the launcher or the logs of their hosts say\n"
    )


def test_a_rank_that_finds_nobody_says_where_it_looked():
    port = free_port()
    with process(1, "runs/a", port, seconds=2) as alone:
        words, _ = alone.communicate(timeout=180)
    assert alone.returncode == 1
    assert words.startswith(f"megagpt: rank 1 on {socket.gethostname()} could not reach rank 0 at 127.0.0.1:{port}\n")


def test_a_port_that_another_program_has_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with process(0, "runs/a", port) as first:
            words, _ = first.communicate(timeout=180)
    assert words == (
        f"megagpt: port {port} is in use on this host: by another job, or by what is left of an earlier one\n"
        "  rank 0, launcher: environment, MASTER_PORT\n"
        "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT; "
        "`ss -ltnp` shows who listens\n"
    )


@pytest.mark.parametrize("world", ["4", "2"])
def test_a_world_that_mpi_does_not_see_is_refused(world):
    env = {**os.environ, "PMI_RANK": "0", "PMI_SIZE": world, "MPI_LOCALRANKID": "0"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        env.pop(name, None)
    made = subprocess.run(
        [sys.executable, str(WORKER), "runs/a", "5"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert made.returncode == 2
    assert made.stdout.startswith(f"megagpt: mpich started {world} ranks, but mpi4py ")
