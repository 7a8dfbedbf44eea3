"""Process group of `megagpt prepare`.

The group is a single process, or all processes that were started by mpirun (connected by MPI) or srun (connected by
sockets).
"""

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
_BLOCK = 1 << 24  # bytes per message


class ProcessGroup:
    """Single-process stand-in for a group of ranks. Every collective returns its own input."""

    rank, size = 0, 1

    def first(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the first rank and return its result on every rank. A UserError is raised on every rank."""
        return work()

    def each(self, work: Callable[[], _T]) -> list[_T]:
        """Run `work` on every rank and return all results on every rank. The first UserError is raised on all ranks."""
        return [work()]

    def local_part(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return this rank's contiguous part of a sequence. The parts are in rank order."""
        count = len(items)
        return items[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def sum_before(self, count: Callable[[], int]) -> int:
        """Return the sum of `count()` over the ranks before this one (MPI's Exscan)."""
        return 0

    def is_shared(self, folder: Path) -> bool:
        """Return True if `folder` is the same folder on every rank."""
        return True

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        """Copy files in `folder` from each rank to the first rank, except those that the first rank already has.

        Args:
            folder: The folder, which has the same path on all ranks.
            names: The names of the files of this rank.
        """


class _CommunicatingGroup(ProcessGroup):
    """Group of several ranks that communicate through an mpi4py communicator, or an object with the same methods."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank = communicator.rank
        self.size = communicator.size

    def first(self, work: Callable[[], _T]) -> _T:
        outcome: _T | UserError = self._communicator.bcast(_outcome(work) if self.rank == 0 else None)
        return self._result_of(outcome)

    def each(self, work: Callable[[], _T]) -> list[_T]:
        return [self._result_of(outcome) for outcome in self._communicator.allgather(_outcome(work))]

    def sum_before(self, count: Callable[[], int]) -> int:
        return sum(self.each(count)[: self.rank])

    def is_shared(self, folder: Path) -> bool:
        marker = folder / f"marker.{self.first(lambda: secrets.token_hex(8))}"
        self.first(marker.touch)
        shared = all(self.each(marker.exists))
        self.first(marker.unlink)
        return shared

    @staticmethod
    def _result_of(outcome: _T | UserError) -> _T:
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        for owner, theirs in enumerate(self.each(lambda: list(names))):
            if unsafe := [name for name in theirs if Path(name).name != name]:
                raise MachineError("a rank names files outside the folder of shards", ", ".join(unsafe[:3]))
            missing = self.first(lambda theirs=theirs: [name for name in theirs if not (folder / name).exists()])  # type: ignore[misc]
            for name in missing if owner else ():
                if self.rank == owner:
                    self._send(folder / name)
                elif self.rank == 0:
                    self._receive(folder / name, owner)

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                self._communicator.send(block, 0)
        self._communicator.send(b"", 0)

    def _receive(self, path: Path, owner: int) -> None:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            while block := self._communicator.recv(source=owner):
                file.write(block)
        partial.replace(path)


def _outcome(work: Callable[[], _T]) -> _T | UserError:
    try:
        return work()
    except UserError as error:
        return error
    except OSError as error:
        do = (
            "make sure that all hosts can read and write there, then run the command again: it resumes where it stopped"
        )
        return MachineError(f"a file cannot be used: {error.strerror}", str(error.filename or ""), do)


@contextmanager
def process_group(folder: Path) -> Iterator[ProcessGroup]:
    """Connect all ranks of this command for the duration of the `with` block.

    An unexpected error on one rank ends all ranks. A UserError is printed only by the first rank.

    Args:
        folder: The output folder, in which SLURM tasks find the key of their job.

    Yields:
        The process group.
    """
    rank = from_mpi_or_slurm(os.environ)
    if rank.world_size == 1:
        yield ProcessGroup()
    elif rank.launcher == "slurm":
        from megagpt.prepare.sockets import connected

        env_secret = secret.from_environment(os.environ)
        with _errors_on_first_rank_only(rank.rank), connected(rank, folder, env_secret) as tasks:
            yield _CommunicatingGroup(tasks)
    else:
        with _errors_on_first_rank_only(rank.rank):
            world = _mpi(rank.world_size)
            try:
                yield _CommunicatingGroup(world)
            except UserError:
                raise
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                world.Abort(1)


def _mpi(size: int) -> Any:
    """Return the MPI communicator of all ranks."""
    try:
        from mpi4py import MPI
    except ImportError:
        what = "several processes were started, but mpi4py is not installed"
        raise UserError(what, "mpirun", 'pip install "megagpt[mpi]", or start one process') from None
    if MPI.COMM_WORLD.size != size:
        what = f"{size} processes were started, but MPI sees {MPI.COMM_WORLD.size}"
        raise UserError(what, MPI.Get_library_version().splitlines()[0], "start them with the mpirun of this MPI")
    return MPI.COMM_WORLD


@contextmanager
def _errors_on_first_rank_only(rank: int) -> Iterator[None]:
    """Raise a UserError only on the first rank. All other ranks exit without a message."""
    try:
        yield
    except UserError as error:
        if rank == 0:
            raise
        raise SystemExit(error.exit_code) from None
