"""Rendezvous of real processes on one port: the ranks of a job find each other, and those of another job never join."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from megagpt.cluster import Rank, free_port, preflight, rendezvous
from megagpt.errors import MachineError, UserError
from tests.unit.cluster.test_preflight import launched

WORKER = Path(__file__).parent / "rendezvous_worker.py"


@contextmanager
def process(rank, name, port, world=2, seconds=60, **more):
    """Start one rank of a job, and kill it at the end."""
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    started = subprocess.Popen(
        [sys.executable, str(WORKER), name, str(seconds)],
        env={**os.environ, **env, "MASTER_PORT": str(port), **more},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_two_jobs_on_one_port_never_join_and_the_first_continues():
    port = free_port()
    with ExitStack() as stack:
        first = [stack.enter_context(process(0, "runs/a", port))]
        # rank 1 of the other job starts before rank 1 of the first job, and must not take its place
        intruder = stack.enter_context(process(1, "runs/b", port))
        printed, _ = intruder.communicate(timeout=180)
        assert intruder.returncode == 1
        assert printed == (
            f"megagpt: two jobs share the port {port} of 127.0.0.1: runs/a listens there, this is runs/b\n"
            "  rank 1, launcher: environment\n"
            "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT\n"
        )
        second = stack.enter_context(process(0, "runs/b", port))
        printed, _ = second.communicate(timeout=180)
        assert second.returncode == 1
        assert printed.startswith(
            f"megagpt: port {port} is in use on this host, by another job or by processes left from"
        )
        first.append(stack.enter_context(process(1, "runs/a", port)))
        assert [one.stdout.readline() for one in first] == ["started as rank 0\n", "started as rank 1\n"]
        # the same job started twice: the names are equal, but its ranks have already started
        double = stack.enter_context(process(1, "runs/a", port))
        printed, _ = double.communicate(timeout=180)
        assert printed.startswith(f"megagpt: two processes are rank 1 of the job at 127.0.0.1:{port}\n")
        assert [one.poll() for one in first] == [None, None]


def test_the_launchers_job_id_distinguishes_two_jobs_with_one_run_directory():
    port = free_port()
    with process(0, "runs/a", port, MEGAGPT_JOB="7"), process(1, "runs/a", port, MEGAGPT_JOB="8") as other:
        assert "runs/a (job 7) listens there, this is runs/a (job 8)" in other.communicate(timeout=180)[0]


def test_ranks_that_do_not_start_are_named():
    with process(0, "runs/a", free_port(), world=3, seconds=3) as alone:
        printed, _ = alone.communicate(timeout=180)
    assert alone.returncode == 1
    assert printed == (
        "megagpt: 2 of 3 ranks have not started within 3 s\n  ranks 1, 2\n"
        "  do: see the launcher's output, or the logs of their hosts\n"
    )


def test_a_rank_that_cannot_reach_rank_0_names_the_address():
    port = free_port()
    with process(1, "runs/a", port, seconds=2) as alone:
        printed, _ = alone.communicate(timeout=180)
    assert alone.returncode == 1
    assert printed.startswith(f"megagpt: rank 1 on {socket.gethostname()} could not reach rank 0 at 127.0.0.1:{port}\n")


def test_a_port_in_use_by_another_program_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with process(0, "runs/a", port) as first:
            printed, _ = first.communicate(timeout=180)
    assert printed == (
        f"megagpt: port {port} is in use on this host, by another job or by processes left from an earlier one\n"
        "  rank 0, launcher: environment, MASTER_PORT\n"
        "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT; "
        "`ss -ltnp` shows which program listens\n"
    )


@pytest.mark.parametrize("world", ["4", "2"])
def test_a_world_size_that_mpi_does_not_confirm_is_refused(world):
    env = {**os.environ, "PMI_RANK": "0", "PMI_SIZE": world, "MPI_LOCALRANKID": "0"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        env.pop(name, None)
    made = subprocess.run(
        [sys.executable, str(WORKER), "runs/a", "5"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert made.returncode == 2
    assert made.stdout.startswith(f"megagpt: mpich started {world} ranks, but mpi4py ")


def test_rank_0_prints_which_host_it_waits_for_and_why(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_REPORT_INTERVAL", timedelta(seconds=1))
    monkeypatch.setattr(preflight, "ancestors", lambda: [launched(["127.0.0.1", "nodee2.invalid", "localhost"])])
    rank = Rank(0, 0, 3, port=free_port(), launcher="deepspeed")
    with pytest.raises(MachineError) as caught, rendezvous.rendezvous(rank, "runs/a", timedelta(seconds=2)):
        pass
    assert str(caught.value) == (
        "megagpt: 2 of 3 ranks have not started within 2 s\n"
        "  rank 1 on nodee2.invalid: the name does not resolve\n  rank 2 on localhost\n"
        "  do: see the launcher's output, or the logs of their hosts"
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "megagpt: waiting for rank 1 on nodee2.invalid for 1 s: the name does not resolve",
        "megagpt: waiting for rank 2 on localhost for 1 s",
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_an_address_that_does_not_resolve_is_an_error_at_once(number, monkeypatch):
    rank = Rank(number, 0, 2, address="nodee1.invalid", port=free_port(), launcher="torchrun")
    monkeypatch.setattr(rendezvous, "_store", lambda *_: pytest.fail("it has connected"))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it has waited"))
    with pytest.raises(UserError) as caught, rendezvous.rendezvous(rank, "runs/a"):
        pass
    assert str(caught.value) == (
        f"megagpt: the address of rank 0 does not resolve on {socket.gethostname()}: nodee1.invalid\n"
        "  MASTER_ADDR, launcher: torchrun\n  do: correct the name, or add it to DNS or /etc/hosts"
    )


def test_under_kubernetes_the_name_of_a_pod_may_resolve_later(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(rendezvous, "_store", lambda *_: 1 / 0)
    rank = Rank(1, 0, 2, address="megagpt-0.invalid", port=free_port())
    with pytest.raises(ZeroDivisionError), rendezvous.rendezvous(rank, "runs/a"):
        pass
