"""The processes that prepare together: this one alone, or those that mpirun or srun started, which talk by MPI."""

from __future__ import annotations

import os
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megagpt.cluster import from_mpi_or_slurm, secret
from megagpt.errors import MachineError, UserError

_T = TypeVar("_T")
_BLOCK = 1 << 24  # bytes sent at a time


class Ranks:
    """Ranks that take turns and share work. This is the only rank, and every call is its own answer."""

    rank, size = 0, 1

    def first(self, work: Callable[[], _T]) -> _T:
        """What `work` gives on the first rank, for all; its error is every rank's."""
        return work()

    def each(self, work: Callable[[], _T]) -> list[_T]:
        """What `work` gives on each rank, in their order, for all; the first error of any is every rank's."""
        return [work()]

    def share(self, things: Sequence[_T]) -> Sequence[_T]:
        """This rank's part of things in a row: the first rank has the first of them."""
        count = len(things)
        return things[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def sum_before(self, count: Callable[[], int]) -> int:
        """The sum of what `count` gives on the ranks before this one (MPI's Exscan)."""
        return 0

    def see_one(self, folder: Path) -> bool:
        """Whether the `folder` of each rank is the first one's."""
        return True

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        """Have the first rank hold the files in `folder` that each rank names."""


class _Joined(Ranks):
    """Several ranks, which talk through a `world`: mpi4py's communicator, or what has some of its words."""

    def __init__(self, world: Any) -> None:
        self._world, self.rank, self.size = world, world.rank, world.size

    def first(self, work: Callable[[], _T]) -> _T:
        outcome: _T | UserError = self._world.bcast(_outcome(work) if self.rank == 0 else None)
        return self._agreed(outcome)

    def each(self, work: Callable[[], _T]) -> list[_T]:
        return [self._agreed(outcome) for outcome in self._world.allgather(_outcome(work))]

    def sum_before(self, count: Callable[[], int]) -> int:
        return sum(self.each(count)[: self.rank])

    def see_one(self, folder: Path) -> bool:
        token = folder / f"token.{self.first(lambda: secrets.token_hex(8))}"
        self.first(token.touch)
        one = all(self.each(token.exists))
        self.first(token.unlink)
        return one

    @staticmethod
    def _agreed(outcome: _T | UserError) -> _T:
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        for owner, theirs in enumerate(self.each(lambda: list(names))):
            if unsafe := [name for name in theirs if Path(name).name != name]:
                raise MachineError("a rank names files outside of the folder of shards", ", ".join(unsafe[:3]))
            lacking = self.first(lambda theirs=theirs: [name for name in theirs if not (folder / name).exists()])  # type: ignore[misc]
            for name in lacking if owner else ():
                if self.rank == owner:
                    self._send(folder / name)
                elif self.rank == 0:
                    self._receive(folder / name, owner)

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                self._world.send(block, 0)
        self._world.send(b"", 0)

    def _receive(self, path: Path, owner: int) -> None:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            while block := self._world.recv(source=owner):
                file.write(block)
        partial.replace(path)


def _outcome(work: Callable[[], _T]) -> _T | UserError:
    try:
        return work()
    except UserError as error:
        return error
    except OSError as error:
        do = "see that all hosts can read and write there, then run the command again: it resumes where it stopped"
        return MachineError(f"a file cannot be used: {error.strerror}", str(error.filename or ""), do)


@contextmanager
def joined_ranks(folder: Path) -> Iterator[Ranks]:
    """All ranks of this command. One that fails by surprise ends them all; a user's mistake is told by the first.

    `folder` is the output's, in which tasks of SLURM find the key of their job.
    """
    place = from_mpi_or_slurm(os.environ)
    if place.world_size == 1:
        yield Ranks()
    elif place.launcher == "slurm":
        from megagpt.prepare.sockets import connected

        given = secret.from_environment(os.environ)
        with _told_once(place.rank), connected(place, folder, given) as tasks:
            yield _Joined(tasks)
    else:
        with _told_once(place.rank):
            world = _mpi(place.world_size)
            try:
                yield _Joined(world)
            except UserError:
                raise
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                world.Abort(1)


def _mpi(size: int) -> Any:
    """The communicator of all ranks."""
    try:
        from mpi4py import MPI
    except ImportError:
        what = "several processes were started, which need mpi4py to work together"
        raise UserError(what, "mpirun", 'pip install "megagpt[mpi]", or start one process') from None
    if MPI.COMM_WORLD.size != size:
        what = f"{size} processes were started, and MPI knows of {MPI.COMM_WORLD.size}"
        raise UserError(what, MPI.Get_library_version().splitlines()[0], "start them by the mpirun of this MPI")
    return MPI.COMM_WORLD


@contextmanager
def _told_once(rank: int) -> Iterator[None]:
    """Within it, the first rank alone says what the user's mistake is."""
    try:
        yield
    except UserError as error:
        if rank == 0:
            raise
        raise SystemExit(error.exit_code) from None
