"""Tasks of SLURM that talk through sockets, in the few words of mpi4py that `ranks` uses: no MPI is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias, cast

from megagpt.distributed import Rank, calls
from megagpt.distributed.meeting import JOIN_LIMIT
from megagpt.errors import MachineError

Line: TypeAlias = "Connection[Any, Any]"  # a plain class when it runs
_WORD = 5.0  # seconds in which a caller says who it is
_ANSWER = 30.0  # seconds in which the first task answers, who hears one caller after the other


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
    lines: dict[int, Line] = {}
    try:
        if place.rank:
            lines[0] = _called(place)
        else:
            _wait_for_all(place, lines)
        yield Sockets(place.rank, place.world_size, lines)
    finally:
        for line in lines.values():
            line.close()


def _called(place: Rank) -> Line:
    """A line to task 0, which first says of which job it is: that of another has another port."""
    line = Connection(calls.call(place, place.port, JOIN_LIMIT.total_seconds()).detach())
    theirs = _heard(line, _ANSWER)
    if theirs != place.job:
        line.close()
        raise calls.two_jobs(place, place.port, theirs or "a program that is not megagpt", place.job)
    line.send_bytes(str(place.rank).encode())
    return line


def _wait_for_all(place: Rank, lines: dict[int, Line]) -> None:
    limit = JOIN_LIMIT.total_seconds()
    with calls.listen(place, place.port) as server:
        callers = calls.callers(server, time.monotonic() + limit)
        while len(lines) < place.world_size - 1:
            if (caller := next(callers, None)) is None:
                missing = [str(task) for task in range(1, place.world_size) if task not in lines]
                what, do = f"not all tasks have come within {limit:g} s", "see what they said"
                raise MachineError(what, f"missing: {', '.join(missing)}", do)
            line = Connection(caller[0].detach())
            with suppress(OSError):  # it has gone again
                line.send_bytes(place.job.encode())
            task = _heard(line, _WORD)
            if task.isdecimal():
                lines[int(task)] = line


def _heard(line: Line, limit: float) -> str:
    """The short text that the other end says within `limit` seconds; "" where it says none: it may be anybody."""
    with suppress(OSError, EOFError, UnicodeDecodeError):
        if line.poll(limit):
            return line.recv_bytes(1000).decode()
    return ""


def _ended(task: int) -> MachineError:
    do = "see what it said, then type the command again: it goes on where it stopped"
    return MachineError(f"task {task} has ended before its work was done", "srun", do)
