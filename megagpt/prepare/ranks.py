"""The processes that prepare together: this one alone, or those that mpirun or srun started, which talk by MPI."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megagpt.distributed import mpi_size
from megagpt.errors import UserError

_T = TypeVar("_T")
_BLOCK = 1 << 24  # bytes sent at a time


class Ranks:
    """Ranks that take turns and share work. This is the only rank, and every call is its own answer."""

    rank, size = 0, 1

    def first(self, work: Callable[[], _T]) -> _T:
        """What `work` gives on the first rank, for all; its error is every rank's."""
        return work()

    def all(self, value: _T) -> list[_T]:
        """Each rank's value, in their order, for all."""
        return [value]

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        """Have the first rank hold the files in `folder` that each rank names, where the disk is not shared."""


class _MpiRanks(Ranks):
    def __init__(self, world: Any) -> None:
        self._world, self.rank, self.size = world, world.rank, world.size

    def first(self, work: Callable[[], _T]) -> _T:
        outcome: _T | UserError | None = None
        if self.rank == 0:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        answer: _T | UserError = self._world.bcast(outcome)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def all(self, value: _T) -> list[_T]:
        values: list[_T] = self._world.allgather(value)
        return values

    def gather_files(self, folder: Path, names: Sequence[str]) -> None:
        for owner, theirs in enumerate(self.all(list(names))):
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


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """All ranks of this command. One that fails by surprise ends them all; a user's mistake is told by the first."""
    if mpi_size(os.environ) == 1:
        yield Ranks()
        return
    try:
        from mpi4py import MPI
    except ImportError:
        what = "several processes were started, which need mpi4py to work together"
        raise UserError(what, "mpirun or srun", 'pip install "megagpt[mpi]", or start one process') from None
    world = MPI.COMM_WORLD
    try:
        yield _MpiRanks(world)
    except UserError as error:
        if world.rank == 0:
            raise
        raise SystemExit(error.exit_code) from None
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)
        raise
