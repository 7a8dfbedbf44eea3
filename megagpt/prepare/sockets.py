"""Tasks of SLURM that talk through sockets, with the few methods of mpi4py that `ranks` uses: no MPI is needed.

Each connection is authenticated by the secret of the job, and carries plain data alone (plain.py).
"""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagpt.distributed import Rank, calls
from megagpt.distributed.calls import Endpoint
from megagpt.distributed.handshake import Channel, ForgedMessage
from megagpt.distributed.meeting import JOIN_LIMIT
from megagpt.errors import MachineError
from megagpt.prepare import plain

_AGAIN = "see its messages, then run the command again: it resumes where it stopped"


class Sockets:
    """A star: the first task has a channel to each of the others. Raises MachineError if a task has ended."""

    def __init__(self, rank: int, size: int, channels: dict[int, Channel]) -> None:
        self.rank, self.size, self._channels = rank, size, channels

    def bcast(self, value: Any) -> Any:
        """Return the first task's value on every task."""
        if self.rank:
            return self.recv(0)
        message = plain.dumps(value)
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
            while waiting.get_map():  # in any order, so that a task that has ended is noticed while others work
                for key, _ in waiting.select():
                    waiting.unregister(key.fileobj)
                    values[key.data] = self.recv(key.data)
        return list(self.bcast([values[rank] for rank in range(self.size)]))

    def send(self, value: Any, dest: int) -> None:
        """Send a value to the first task, or from it."""
        self._send(plain.dumps(value), dest)

    def recv(self, source: int) -> Any:
        """Receive a value from a task."""
        try:
            return plain.loads(self._channels[source].receive())
        except (ForgedMessage, plain.BadMessage) as error:
            what = f"a message of task {source} was not accepted: {error}"
            raise MachineError(what, "srun", "see whether all hosts run the same megagpt") from None
        except (EOFError, OSError):
            raise _ended(source) from None

    def _send(self, message: bytes, dest: int) -> None:
        try:
            self._channels[dest].send(message)
        except OSError:
            raise _ended(dest) from None


@contextmanager
def connected(rank: Rank, folder: Path, given: bytes | None) -> Iterator[Sockets]:
    """Connect all tasks of this step of the job.

    Args:
        rank: This task.
        folder: Folder of the key file, which all tasks see unless `given` is there.
        given: The secret of the environment, None if there is none.

    Yields:
        This task's connections.

    Raises:
        MachineError: Not all tasks have come in time, or rank 0 cannot be reached.
    """
    door = Endpoint(rank, rank.port, "prepare", folder, given)
    channels: dict[int, Channel] = {}
    try:
        if rank.rank:
            channels[0] = calls.connect(door, JOIN_LIMIT.total_seconds())
        else:
            _wait_for_all(door, channels)
        yield Sockets(rank.rank, rank.world_size, channels)
    finally:
        for channel in channels.values():
            channel.close()


def _wait_for_all(door: Endpoint, channels: dict[int, Channel]) -> None:
    limit, size = JOIN_LIMIT.total_seconds(), door.rank.world_size
    with calls.listen(door, limit) as callers:
        while len(channels) < size - 1:
            if (caller := next(callers, None)) is None:
                missing = [str(task) for task in range(1, size) if task not in channels]
                what = f"not all tasks have come within {limit:g} s"
                raise MachineError(what, f"missing: {', '.join(missing)}", "see what they said")
            task, channel = caller
            if task in channels:  # it has called twice, since its first connection was cut
                channels[task].close()
            channels[task] = channel


def _ended(task: int) -> MachineError:
    return MachineError(f"task {task} has ended before its work was done", "srun", _AGAIN)
