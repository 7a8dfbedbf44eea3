"""Rendezvous of the ranks of a job, at which they check that they belong to the same job.

Without this check, rank 1 of a second job on the same port would join the first job and wait there forever.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from megagpt.cluster import preflight, reachability, tcp
from megagpt.cluster.launch_env import Rank, free_port
from megagpt.errors import MachineError, UserError

# Time for all ranks to start. It is long because hosts may load Python from a slow disk.
JOIN_LIMIT = timedelta(minutes=10)
# Time to wait for the name of rank 0's job, which rank 0 publishes as soon as it starts.
_ANSWER_LIMIT = timedelta(seconds=30)
# Time between two messages about missing ranks.
_REPORT_INTERVAL = timedelta(seconds=30)


@contextmanager
def rendezvous(rank: Rank, name: str, limit: timedelta = JOIN_LIMIT) -> Iterator[Rank]:
    """Wait for the other ranks of the job. The context must stay open until the job ends.

    Args:
        rank: This rank.
        name: Name of the job, such as its run directory. It must be the same on all ranks of this job, and different
            from the names of other jobs.
        limit: Time limit for all ranks to start.

    Yields:
        This rank, with the address and port of rank 0.

    Raises:
        UserError: The address of rank 0 does not resolve, or MPI does not work.
        MachineError: The port is in use or belongs to another job, or not all ranks have started within `limit`.
    """
    if not rank.address:
        rank = _address_from_mpi(rank)
    store = None
    if rank.world_size > 1:
        tcp.check_address(rank)
        store = _store(rank, limit)
        _compare_jobs(store, rank, f"{name} (job {rank.job})" if rank.job else name)
        if not _agent_listens():
            _check_in(store, rank, limit)
    yield rank
    del store  # Until here, the store of rank 0 keeps torch's own store on the same port alive.


def _agent_listens() -> bool:
    """Return True if torchrun's agent listens instead of rank 0. The agent separates jobs and outlives its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: Rank, limit: timedelta) -> Any:
    from torch._C._distributed_c10d import TCPStore

    listens = rank.main and not _agent_listens()
    try:
        return TCPStore(
            rank.address, rank.port, is_master=listens, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        if listens and (reason := re.search(r"name: E\w+, message: (.+)", str(error))):
            raise tcp.port_in_use(rank, rank.port, reason[1]) from None
        raise tcp.rank_0_unreachable(rank, rank.port, str(error).splitlines()[0]) from None


def _compare_jobs(store: Any, rank: Rank, job: str) -> None:
    """Publish the name of the job on rank 0, and compare it with this rank's job on the other ranks.

    A rank of another job does not write to the store. Raises MachineError if the jobs differ.
    """
    if rank.main:
        store.set("megagpt/job", job)
        return
    store.set_timeout(_ANSWER_LIMIT)
    try:
        theirs = store.get("megagpt/job").decode()
    except RuntimeError:
        theirs = "a program other than megagpt"
    if theirs != job:
        raise tcp.port_shared_by_jobs(rank, rank.port, theirs, job)


def _check_in(store: Any, rank: Rank, limit: timedelta) -> None:
    """Record that this rank has started. Rank 0 then waits for all ranks.

    Raises MachineError if another process has recorded the same rank.
    """
    if store.add(f"megagpt/started/{rank.rank}", 1) > 1:
        raise MachineError(
            f"two processes are rank {rank.rank} of the job at {rank.address}:{rank.port}",
            f"launcher: {rank.launcher}",
            f"check whether the same job was started twice; otherwise {tcp.USE_OTHER_PORT}",
        )
    if rank.main:
        _wait_for_ranks(store, rank, limit)


def _wait_for_ranks(store: Any, rank: Rank, limit: timedelta) -> None:
    """Wait until all ranks have started. Regularly prints which ranks are missing, their hosts, and possible causes."""
    keys = {number: f"megagpt/started/{number}" for number in range(rank.world_size)}
    hosts = preflight.host_per_rank(preflight.ancestors())
    started, missing = time.monotonic(), list(keys)
    while missing:
        elapsed = timedelta(seconds=time.monotonic() - started)
        if elapsed > limit:
            raise MachineError(
                f"{len(missing)} of {rank.world_size} ranks have not started within {limit.total_seconds():.0f} s",
                "\n".join(_describe_missing(missing, hosts)),
                "see the launcher's output, or the logs of their hosts",
            )
        if elapsed > _REPORT_INTERVAL / 2:
            for line in _describe_missing(missing, hosts, f" for {elapsed.total_seconds():.0f} s"):
                print(f"megagpt: waiting for {line}", file=sys.stderr, flush=True)
        try:
            store.wait(list(keys.values()), min(_REPORT_INTERVAL, limit - elapsed + timedelta(milliseconds=1)))
        except RuntimeError:  # Not all ranks have started within that time.
            missing = [number for number, key in keys.items() if not store.check([key])]
        else:
            missing = []


def _describe_missing(missing: Sequence[int], hosts: Sequence[str], duration: str = "") -> list[str]:
    """Return one line per host with its missing ranks, such as "rank 1 on node2: the name does not resolve"."""
    by_host: dict[str, list[str]] = {}
    for number in missing:
        by_host.setdefault(hosts[number] if number < len(hosts) else "", []).append(str(number))
    lines = []
    for host, numbers in by_host.items():
        ranks = f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        if not host:
            lines.append(ranks + duration)
        elif not reachability.resolves(host):
            lines.append(f"{ranks} on {host}{duration}: the name does not resolve")
        elif reachability.unreachable_addresses([host]):
            lines.append(f"{ranks} on {host}{duration}: the host does not answer")
        else:
            lines.append(f"{ranks} on {host}{duration}")
    return lines


def _address_from_mpi(rank: Rank) -> Rank:
    """Return `rank` with an address and port that rank 0 chooses and broadcasts over MPI."""
    do = (
        "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv): then MPI is not needed"
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        what = f"{rank.launcher} started {rank.world_size} ranks, but mpi4py does not work: {reason}"
        raise UserError(what, "MASTER_ADDR is not set", do) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != rank.world_size:
        raise UserError(
            f"{rank.launcher} started {rank.world_size} ranks, but mpi4py sees a world size of {world.Get_size()}",
            f"mpi4py has loaded {MPI.Get_library_version().splitlines()[0]}",
            do,
        )
    address, port = world.bcast((reachability.own_address(), free_port()) if rank.main else None, root=0)
    return replace(rank, address=address, port=port)
