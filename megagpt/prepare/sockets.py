"""Communication between SLURM tasks over TCP sockets, with the methods of mpi4py that `ranks` uses; MPI is not needed.

Each connection is authenticated with the secret of the job, and carries only plain data (plain.py).
"""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagpt.cluster import Rank, tcp
from megagpt.cluster.handshake import Channel, ForgedMessage
from megagpt.cluster.rendezvous import JOIN_LIMIT
from megagpt.cluster.tcp import Endpoint
from megagpt.errors import MachineError
from megagpt.prepare import plain_data

_RESUME = "see its messages, then run the command again: it resumes where it stopped"


class SocketCommunicator:
    """Star topology: the first task has a channel to each of the others. Raises MachineError if a task has ended."""

    def __init__(self, rank: int, size: int, channels: dict[int, Channel]) -> None:
        self.rank, self.size, self._channels = rank, size, channels

    def bcast(self, value: Any) -> Any:
        """Return the first task's value on every task."""
        if self.rank:
            return self.recv(0)
        message = plain_data.dumps(value)
        for other in self._channels:
            self._send(message, other)
        return value

    def allgather(self, value: Any) -> list[Any]:
        """Return each task's value, in the order of the tasks, on every task."""
        if self.rank:
            self.send(value, 0)
            return list(self.recv(0))
        values = {0: value}
        with selectors.DefaultSelector() as waiting:
            for other, channel in self._channels.items():
                waiting.register(channel, selectors.EVENT_READ, other)
            while waiting.get_map():  # in any order, to detect that a task has ended while others still work
                for key, _ in waiting.select():
                    waiting.unregister(key.fileobj)
                    values[key.data] = self.recv(key.data)
        return list(self.bcast([values[rank] for rank in range(self.size)]))

    def send(self, value: Any, dest: int) -> None:
        """Send a value to the first task, or from it."""
        self._send(plain_data.dumps(value), dest)

    def recv(self, source: int) -> Any:
        """Receive a value from a task."""
        try:
            return plain_data.loads(self._channels[source].receive())
        except (ForgedMessage, plain_data.BadMessage) as error:
            what = f"a message from task {source} was rejected: {error}"
            raise MachineError(what, "srun", "check that all hosts run the same megagpt") from None
        except (EOFError, OSError):
            raise _ended(source) from None

    def _send(self, message: bytes, dest: int) -> None:
        try:
            self._channels[dest].send(message)
        except OSError:
            raise _ended(dest) from None


@contextmanager
def connected(rank: Rank, folder: Path, env_secret: bytes | None) -> Iterator[SocketCommunicator]:
    """Connect all tasks of this step of the job.

    Args:
        rank: This task.
        folder: Folder of the key file, which all tasks can read; not used if `env_secret` is set.
        env_secret: The secret from the environment, None if there is none.

    Yields:
        This task's connections.

    Raises:
        MachineError: Not all tasks have connected in time, or rank 0 cannot be reached.
    """
    endpoint = Endpoint(rank, rank.port, "prepare", folder, env_secret)
    channels: dict[int, Channel] = {}
    try:
        if rank.rank:
            channels[0] = tcp.connect(endpoint, JOIN_LIMIT.total_seconds())
        else:
            _wait_for_all(endpoint, channels)
        yield SocketCommunicator(rank.rank, rank.world_size, channels)
    finally:
        for channel in channels.values():
            channel.close()


def _wait_for_all(endpoint: Endpoint, channels: dict[int, Channel]) -> None:
    limit, size = JOIN_LIMIT.total_seconds(), endpoint.rank.world_size
    with tcp.listen(endpoint, limit) as callers:
        while len(channels) < size - 1:
            if (caller := next(callers, None)) is None:
                missing = [str(task) for task in range(1, size) if task not in channels]
                what = f"not all tasks have connected within {limit:g} s"
                raise MachineError(what, f"missing: {', '.join(missing)}", "see their messages")
            task, channel = caller
            if task in channels:  # it has connected again after its first connection was cut
                channels[task].close()
            channels[task] = channel


def _ended(task: int) -> MachineError:
    return MachineError(f"task {task} ended before its work was done", "srun", _RESUME)
