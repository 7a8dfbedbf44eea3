"""`megagpt doctor --as-rank`: the ranks have been started already, by srun or another, and come to rank 0 by a socket.

Not torch's store: the table of a host whose torch is broken must come, too.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from megagpt.cluster import Rank, secret, tcp
from megagpt.cluster.tcp import Door
from megagpt.doctor import agent
from megagpt.doctor.examination import Host, life
from megagpt.doctor.finding import BAD, Finding
from megagpt.doctor.links import Lines, Link, Lost, local, over_channel
from megagpt.errors import UserError

_HELLO = 5.0  # seconds in which a rank that has connected reports its host


def _port(rank: Rank) -> int:
    """The port after the job's own, on which a launcher may listen already. Raises UserError where there is none."""
    if not rank.address or not rank.port:
        raise UserError(
            f"{rank.world_size} ranks were started by {rank.launcher}, but none knows where rank 0 listens",
            "MASTER_ADDR, MASTER_PORT",
            "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv)",
        )
    return rank.port + 1


def _door(rank: Rank, env: Mapping[str, str]) -> Door:
    return Door(rank, _port(rank), "doctor", secret.state_folder(env), secret.from_environment(env))


def serve(rank: Rank, limit: float, env: Mapping[str, str]) -> None:
    """Connect to rank 0, and do what it orders. Raises MachineError if it is not found within `limit` s."""
    channel = tcp.call(_door(rank, env), limit)
    try:
        stream = Lines(channel)
        agent.serve(stream, stream, rank=rank.rank, local_rank=rank.local_rank)
    finally:
        channel.close()


def receive(rank: Rank, limit: float, env: Mapping[str, str]) -> list[Host]:
    """Wait on rank 0 for all other ranks.

    Args:
        rank: This rank.
        limit: Seconds after which a rank that has not come stands for a host of its own, which is lost.
        env: Environment of this process.

    Returns:
        The hosts of all ranks, this one included.

    Raises:
        MachineError: The port is in use, or the key of the job cannot be written.
    """
    came: dict[int, tuple[str, int, Link]] = {0: (socket.gethostname(), rank.local_rank, local())}
    with tcp.callers(_door(rank, env), limit) as callers:
        while len(came) < rank.world_size and (caller := next(callers, None)):
            number, channel = caller
            link = over_channel(channel, f"rank {number}")
            if who := _hello(link, limit):
                link.host = who["host"]
                if number in came:  # it has called twice, since its first connection was cut
                    came[number][2].close()
                came[number] = (who["host"], who["local_rank"], link)
            else:
                link.close()
    hosts: dict[str, list[tuple[Link | None, list[list[int]]]]] = {}
    for number, (name, place, link) in sorted(came.items()):
        hosts.setdefault(name, []).append((link, [[number, place]]))
    absent = [number for number in range(rank.world_size) if number not in came]
    return [*(Host(name, workers) for name, workers in hosts.items()), *(_absent(number, limit) for number in absent)]


def _hello(link: Link, limit: float) -> dict[str, Any] | None:
    """What a rank reports of itself; None if it has ended or hangs."""
    try:
        who = link.ask("hello", _HELLO, limit=life(limit))
    except Lost:
        return None
    return who if isinstance(who.get("host"), str) and isinstance(who.get("local_rank"), int) else None


def _absent(number: int, limit: float) -> Host:
    do = "see what the launcher or that rank's log says: it has not been started, or does not find rank 0"
    return Host(f"rank {number}", [(None, [[number, 0]])],
                lost=Finding("reach", BAD, f"has not come in {limit:.0f} s", do, (f"rank {number}",)))  # fmt: skip
