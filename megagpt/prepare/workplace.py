"""PREFIX.prepare: where the shards lie until the corpus is whole. Held by one command at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megagpt.data.shards import ShardRecord, read_shard_record
from megagpt.errors import UserError


def work_directory(output: str) -> Path:
    """The folder beside OUTPUT where its shards lie until it is whole."""
    return Path(output + ".prepare")


class WorkDirectory:
    """A folder beside the output, locked within the `with` block.

    It outlives a command that fails with shards done, so that the command typed again goes on; else it is removed.
    Raises UserError when another command holds it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> WorkDirectory:
        try:
            self._lock = self._locked()
        except OSError as error:
            what, do = f"cannot write here: {error.strerror}", "choose an --output in a folder that you may write to"
            raise UserError(what, str(error.filename or self.folder), do) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(self.folder.glob("*/*.json")):
            remove_folder(self.folder)
        self._lock.close()

    def _locked(self) -> IO[str]:
        """The lock's open file, in which our process number stands."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                what = f"another `megagpt prepare` (process {file.read() or 'unknown'}) is writing this corpus"
                raise UserError(what, str(self.folder), "wait until it is done, or choose another --output") from None
            if self._is_there(file):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
            file.close()  # of a folder that was removed while we waited to open it

    def _is_there(self, file: IO[str]) -> bool:
        try:
            return (self.folder / "lock").stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False


def resume_or_reset(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder of one corpus's shards. Keep what is there if it was done under the same plan; else remove it."""
    path, text = folder / "plan", json.dumps(plan)
    folder.mkdir(exist_ok=True)
    old = path.read_text() if path.exists() else None
    for file in folder.iterdir():
        if old != text or file.suffix == ".partial":
            file.unlink()
    path.write_text(text)


def completed_records(folder: Path, count: int) -> dict[int, ShardRecord]:
    """The records of the whole shards among the first `count`, by number."""
    found = {number: read_shard_record(folder, number) for number in range(count)}
    return {number: record for number, record in found.items() if record}


def create_memmap(path: Path, kind: npt.DTypeLike, count: int) -> np.memmap[Any, Any]:
    """A new file of so many entries, mapped to be written.

    It takes its room on the disk first, or raises OSError: a write to a map that finds the disk full kills the process.
    """
    size = max(count, 1) * np.dtype(kind).itemsize
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, kind, "r+")


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it."""
    shutil.rmtree(folder, ignore_errors=True)
