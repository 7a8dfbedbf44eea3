"""Ranks call rank 0 at a port of their job, where it listens; and what goes wrong there, said the same way everywhere.

Plain sockets: the doctor's ranks must come where torch is broken, and `megagpt prepare` needs none.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

from megagpt.distributed.place import Rank
from megagpt.errors import MachineError

_PAUSE = 0.1  # seconds between two calls
OTHER_PORT = "give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT"


def call(rank: Rank, port: int, limit: float) -> socket.socket:
    """A connection to rank 0, which may not listen yet. Raises MachineError where it is not found within `limit` s."""
    end = time.monotonic() + limit
    while True:
        try:
            connection = socket.create_connection((rank.address, port), timeout=max(end - time.monotonic(), _PAUSE))
        except OSError as error:
            if time.monotonic() >= end:
                raise unreachable(rank, port, f"{error}, for {limit:g} s") from None
            time.sleep(_PAUSE)
        else:
            connection.settimeout(None)
            return connection


def listen(rank: Rank, port: int) -> socket.socket:
    """Rank 0's end of the calls. Raises MachineError where the port is not free."""
    try:
        return socket.create_server(("", port), backlog=rank.world_size)
    except OSError as error:
        raise not_free(rank, port, os.strerror(error.errno or 0)) from None


def callers(server: socket.socket, end: float) -> Iterator[tuple[socket.socket, str]]:
    """Whoever calls before the clock (`time.monotonic`) shows `end`, and from where: it may be anybody."""
    while (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, address = server.accept()
        except TimeoutError:
            return
        connection.settimeout(None)
        yield connection, str(address[0])


def unreachable(rank: Rank, port: int, why: str) -> MachineError:
    """Rank 0 does not answer."""
    return MachineError(
        f"rank {rank.rank} on {socket.gethostname()} could not reach rank 0 at {rank.address}:{port}",
        why,
        "see whether rank 0 has ended, whether its host's name means the same here, and for a firewall",
    )


def not_free(rank: Rank, port: int, why: str) -> MachineError:
    """Rank 0 cannot listen."""
    used = "is in use on this host: by another job, or by what is left of an earlier one"
    return MachineError(
        f"port {port} {used if 'in use' in why else f'cannot be listened on: {why}'}",
        f"rank 0, launcher: {rank.launcher}, {_variable(rank, port)}",
        f"{OTHER_PORT}; `ss -ltnp` shows who listens",
    )


def two_jobs(rank: Rank, port: int, theirs: str, ours: str) -> MachineError:
    """Rank 0 of another job has answered."""
    return MachineError(
        f"two jobs share the port {port} of {rank.address}: {theirs} listens there, this is {ours}",
        f"rank {rank.rank}, launcher: {rank.launcher}",
        OTHER_PORT,
    )


def _variable(rank: Rank, port: int) -> str:
    return "MASTER_PORT" if port == rank.port else "the port after MASTER_PORT"
