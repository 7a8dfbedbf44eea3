"""`megagpt doctor --as-rank`: the ranks have been started already, by srun or another, and come to rank 0 by a socket.

Not torch's store: the table of a host whose torch is broken must come, too.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from megagpt.distributed import Rank, calls
from megagpt.doctor import agent
from megagpt.doctor.examination import Host, life
from megagpt.doctor.finding import BAD, Finding
from megagpt.doctor.links import Link, Lost, local, over_socket
from megagpt.errors import UserError

_HELLO = 5.0  # seconds in which somebody who connects says that it is a rank


def _port(rank: Rank) -> int:
    """The port after the job's own, on which a launcher may listen already. Raises UserError where there is none."""
    if not rank.address or not rank.port:
        raise UserError(
            f"{rank.world_size} ranks were started by {rank.launcher}, but none knows where rank 0 listens",
            "MASTER_ADDR, MASTER_PORT",
            "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv)",
        )
    return rank.port + 1


def serve(rank: Rank, limit: float) -> None:
    """Come to rank 0, and do what it asks. Raises MachineError where it is not found within `limit` s."""
    connection = calls.call(rank, _port(rank), limit)
    with connection, connection.makefile("rw", encoding="utf-8") as stream:
        agent.serve(stream, stream, rank=rank.rank, local_rank=rank.local_rank, job=rank.job)


def receive(rank: Rank, limit: float) -> list[Host]:
    """On rank 0: the hosts of all ranks, itself included; a rank that does not come in time stands for a host.

    Raises MachineError where the port is in use.
    """
    end = time.monotonic() + limit
    with calls.listen(rank, _port(rank)) as server:
        came: dict[int, tuple[str, int, Link]] = {0: (socket.gethostname(), rank.local_rank, local())}
        callers = calls.callers(server, end)
        while len(came) < rank.world_size and (caller := next(callers, None)):
            link = over_socket(*caller)
            if who := _hello(link, rank, limit):
                link.host = who["host"]
                came[who["rank"]] = (who["host"], who["local_rank"], link)
            else:
                link.close()
    hosts: dict[str, list[tuple[Link | None, list[list[int]]]]] = {}
    for number, (name, place, link) in sorted(came.items()):
        hosts.setdefault(name, []).append((link, [[number, place]]))
    absent = [number for number in range(rank.world_size) if number not in came]
    return [*(Host(name, workers) for name, workers in hosts.items()), *(_absent(number, limit) for number in absent)]


def _hello(link: Link, rank: Rank, limit: float) -> dict[str, Any] | None:
    """What a rank says of itself; None where it is no rank of this job."""
    try:
        who = link.ask("hello", _HELLO, limit=life(limit))
    except Lost:
        return None
    return who if who.get("job") == rank.job and "rank" in who else None


def _absent(number: int, limit: float) -> Host:
    do = "see what the launcher or that rank's log says: it has not been started, or does not find rank 0"
    return Host(f"rank {number}", [(None, [[number, 0]])],
                lost=Finding("reach", BAD, f"has not come in {limit:.0f} s", do, (f"rank {number}",)))  # fmt: skip
