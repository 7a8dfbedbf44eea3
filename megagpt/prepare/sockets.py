"""Tasks of SLURM that talk through sockets, in the few words of mpi4py that `ranks` uses: no MPI is needed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait
from typing import TYPE_CHECKING, Any, cast

from megagpt.distributed import Rank
from megagpt.distributed.meeting import JOIN_LIMIT
from megagpt.errors import MachineError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    Line = Connection[Any, Any]  # a plain class when it runs

_PAUSE = 0.05  # seconds between two tries to reach the first task


class Sockets:
    """A star: the first task has a line to each of the others. Raises MachineError when a task has ended."""

    def __init__(self, rank: int, size: int, lines: dict[int, Line]) -> None:
        self.rank, self.size, self._lines = rank, size, lines

    def bcast(self, value: Any) -> Any:
        """The first task's value, for all."""
        if self.rank:
            return self.recv(0)
        for other in self._lines:
            self.send(value, other)
        return value

    def allgather(self, value: Any) -> list[Any]:
        """Each task's value, in their order, for all."""
        if self.rank:
            self.send(value, 0)
            return list(self.recv(0))
        values, owners = {0: value}, {line: other for other, line in self._lines.items()}
        while owners:  # whoever comes first, so that one that has ended is seen while others work
            for line in cast("list[Line]", wait(list(owners))):
                other = owners.pop(line)
                values[other] = self.recv(other)
        return list(self.bcast([values[rank] for rank in range(self.size)]))

    def send(self, value: Any, dest: int) -> None:
        """Send a value to the first task, or from it."""
        try:
            self._lines[dest].send(value)
        except OSError:
            raise _ended(dest) from None

    def recv(self, source: int) -> Any:
        """What a task has sent."""
        try:
            return self._lines[source].recv()
        except (EOFError, OSError):
            raise _ended(source) from None


@contextmanager
def connected(place: Rank) -> Iterator[Sockets]:
    """All tasks of this step of the job, once they have come; the first one listens at `place`'s address and port."""
    key = f"megagpt prepare {place.job}".encode()  # another job's tasks are turned away
    lines: dict[int, Line] = {}
    try:
        if place.rank:
            lines[0] = _called(place, key)
            lines[0].send(place.rank)
        else:
            _wait_for_all(place, key, lines)
        yield Sockets(place.rank, place.world_size, lines)
    finally:
        for line in lines.values():
            line.close()


def _called(place: Rank, key: bytes) -> Line:
    end = time.monotonic() + JOIN_LIMIT.total_seconds()
    while True:
        try:
            return Client((place.address, place.port), authkey=key)
        except (OSError, EOFError, AuthenticationError) as error:
            if time.monotonic() > end:
                what, do = f"task {place.rank} could not reach task 0: {error}", "see whether it has ended"
                raise MachineError(what, f"{place.address}:{place.port}", do) from None
            time.sleep(_PAUSE)


def _wait_for_all(place: Rank, key: bytes, lines: dict[int, Line]) -> None:
    try:
        listener = Listener(("", place.port), backlog=place.world_size, authkey=key)
    except OSError as error:
        do = "export MASTER_PORT=ANOTHER before srun"
        raise MachineError(f"task 0 cannot listen: {error.strerror}", f"port {place.port}", do) from None
    limit = JOIN_LIMIT.total_seconds()
    end, knock = time.monotonic() + limit, threading.Timer(limit, _knock, [place.port])
    knock.start()
    with listener:
        try:
            while len(lines) < place.world_size - 1:
                _let_in(listener, lines)
                if time.monotonic() >= end:
                    missing = [str(task) for task in range(1, place.world_size) if task not in lines]
                    what, do = f"not all tasks have come within {limit:g} s", "see what they said"
                    raise MachineError(what, f"missing: {', '.join(missing)}", do)
        finally:
            knock.cancel()


def _let_in(listener: Listener, lines: dict[int, Line]) -> None:
    try:
        line = listener.accept()
        lines[line.recv()] = line
    except (OSError, EOFError, AuthenticationError):
        return  # who called was of another job, or has gone


def _knock(port: int) -> None:
    """Wake who waits for callers, which no time limit can."""
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()


def _ended(task: int) -> MachineError:
    do = "see what it said, then type the command again: it goes on where it stopped"
    return MachineError(f"task {task} has ended before its work was done", "srun", do)
