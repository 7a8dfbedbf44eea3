"""Communication between SLURM tasks over TCP sockets, without MPI.

The communicator has the methods of mpi4py's communicator that process_group.py uses. Each connection is authenticated
with the secret of the job, and carries only plain data (see plain_data.py).
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
    """Communicator in which the first task has a channel to every other task.

    All methods raise MachineError if a task has ended.
    """

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
        """Return the values of all tasks, in task order, on every task."""
        if self.rank:
            self.send(value, 0)
            return list(self.recv(0))
        values = {0: value}
        with selectors.DefaultSelector() as waiting:
            for other, channel in self._channels.items():
                waiting.register(channel, selectors.EVENT_READ, other)
            # Receive values in the order of arrival, so that the end of a task is detected while others still work.
            while waiting.get_map():
                for key, _ in waiting.select():
                    waiting.unregister(key.fileobj)
                    values[key.data] = self.recv(key.data)
        return list(self.bcast([values[rank] for rank in range(self.size)]))

    def send(self, value: Any, dest: int) -> None:
        """Send a value to the task `dest`. Either this task or `dest` must be the first task."""
        self._send(plain_data.dumps(value), dest)

    def recv(self, source: int) -> Any:
        """Receive a value from the task `source`."""
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
    """Connect all tasks of this job step for the duration of the `with` block.

    Args:
        rank: The rank of this task.
        folder: The folder of the key file, which all tasks must be able to read. Not used if `env_secret` is set.
        env_secret: The secret from the environment, or None if the environment contains no secret.

    Yields:
        The communicator of this task.

    Raises:
        MachineError: Some tasks did not connect in time, or rank 0 cannot be reached.
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
            if task in channels:  # the task has connected again after its first connection was lost
                channels[task].close()
            channels[task] = channel


def _ended(task: int) -> MachineError:
    return MachineError(f"task {task} ended before its work was done", "srun", _RESUME)
