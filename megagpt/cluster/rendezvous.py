"""The ranks of a job meet, and nobody else: before anything is built they compare what job they are of.

Without this, rank 1 of a second job on the same port becomes a rank of the first one, and waits there for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from megagpt.cluster import tcp
from megagpt.cluster.launch_env import Rank, free_port
from megagpt.cluster.reachability import own_address
from megagpt.errors import MachineError, UserError

JOIN_LIMIT = timedelta(minutes=10)  # for all ranks to start: hosts read their Python from a slow disk
_ANSWER_LIMIT = timedelta(seconds=30)  # rank 0 says its job at once


@contextmanager
def meeting(rank: Rank, name: str, limit: timedelta = JOIN_LIMIT) -> Iterator[Rank]:
    """Meet the other ranks, and yield this one with its address and port known. Leave it when the job ends.

    `name` is what the job is called by all its ranks and by no other job, such as its run directory. Raises
    MachineError where the port is in use or another job's, or where ranks do not come within `limit`.
    """
    if not rank.address:
        rank = _ask_mpi(rank)
    store = None
    if rank.world_size > 1:
        store = _store(rank, limit)
        _compare(store, rank, f"{name} (job {rank.job})" if rank.job else name)
        if not _agent_listens():
            _check_in(store, rank, limit)
    yield rank
    del store  # where rank 0 holds it, torch's own one on the same port is the same


def _agent_listens() -> bool:
    """Whether torchrun's agent listens instead of rank 0. It also keeps two jobs apart, and outlives its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: Rank, limit: timedelta) -> Any:
    from torch._C._distributed_c10d import TCPStore

    listens = rank.main and not _agent_listens()
    try:
        return TCPStore(
            rank.address, rank.port, is_master=listens, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        if listens and (told := re.search(r"name: E\w+, message: (.+)", str(error))):
            raise tcp.not_free(rank, rank.port, told[1]) from None
        raise tcp.unreachable(rank, rank.port, str(error).splitlines()[0]) from None


def _compare(store: Any, rank: Rank, job: str) -> None:
    """Say, or hear from rank 0, what job meets here. A rank of another job leaves no trace."""
    if rank.main:
        store.set("megagpt/job", job)
        return
    store.set_timeout(_ANSWER_LIMIT)
    try:
        theirs = store.get("megagpt/job").decode()
    except RuntimeError:
        theirs = "a program that is not megagpt"
    if theirs != job:
        raise tcp.two_jobs(rank, rank.port, theirs, job)


def _check_in(store: Any, rank: Rank, limit: timedelta) -> None:
    """Note that this rank came, once; rank 0 waits for all."""
    if store.add(f"megagpt/came/{rank.rank}", 1) > 1:
        raise MachineError(
            f"two processes are rank {rank.rank} of the job at {rank.address}:{rank.port}",
            f"launcher: {rank.launcher}",
            f"see whether the same job was started twice; else {tcp.OTHER_PORT}",
        )
    if not rank.main:
        return
    keys = {number: f"megagpt/came/{number}" for number in range(rank.world_size)}
    try:
        store.wait(list(keys.values()), limit)
    except RuntimeError:
        absent = [str(number) for number, key in keys.items() if not store.check([key])]
        raise MachineError(
            f"{len(absent)} of {rank.world_size} ranks have not come in {limit.total_seconds():.0f} s",
            f"rank {', '.join(absent)}",
            "see what the launcher or the logs of their hosts say",
        ) from None


def _ask_mpi(rank: Rank) -> Rank:
    """The address and port that rank 0 chooses, told by MPI, which started us."""
    help_ = (
        "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv): MPI is not asked then"
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{rank.launcher} started {rank.world_size} ranks, but mpi4py does not work: "
                        f"{str(error).splitlines()[0]}", "MASTER_ADDR is not set", help_) from None  # fmt: skip
    world = MPI.COMM_WORLD
    if world.Get_size() != rank.world_size:
        raise UserError(
            f"{rank.launcher} started {rank.world_size} ranks, but mpi4py sees a world of {world.Get_size()}",
            f"mpi4py has loaded {MPI.Get_library_version().splitlines()[0]}",
            help_,
        )
    address, port = world.bcast((own_address(), free_port()) if rank.main else None, root=0)
    return replace(rank, address=address, port=port)
