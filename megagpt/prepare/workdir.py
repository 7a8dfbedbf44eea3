"""The work directory OUTPUT.prepare, which holds the shards until the corpus is complete.

Only one command at a time can use a work directory.
"""

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

from megagpt.errors import UserError
from megagpt.prepare.shards import ShardRecord, read_shard_record


def work_directory(output: str) -> Path:
    """Return the path of the work directory for a corpus with the prefix `output`."""
    return Path(output + ".prepare")


class WorkDirectory:
    """Creates and locks the work directory for the duration of the `with` block.

    At the end of the block, the directory is kept if it contains complete shards, so that the same command can resume.
    Otherwise it is removed. Raises UserError if the directory is in use by another command or cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> WorkDirectory:
        try:
            self._lock = self._acquire_lock()
        except OSError as error:
            what = f"cannot write here: {error.strerror}"
            do = "choose an --output in a folder to which you may write"
            raise UserError(what, str(error.filename or self.folder), do) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(self.folder.glob("*/*.json")):
            remove_folder(self.folder)
        self._lock.close()

    def _acquire_lock(self) -> IO[str]:
        """Open and lock the lock file, write the id of this process to it, and return it."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                what = f"another `megagpt prepare` (process {file.read() or 'unknown'}) is writing this corpus"
                do = "wait until it has finished, or choose another --output"
                raise UserError(what, str(self.folder), do) from None
            if self._is_current(file):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
            file.close()  # the folder was removed between opening and locking the file

    def _is_current(self, file: IO[str]) -> bool:
        """Return True if the open file is still the lock file in the folder."""
        try:
            return (self.folder / "lock").stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False


def resume_or_reset(folder: Path, plan: dict[str, Any]) -> None:
    """Create the folder for the shards of a corpus if it does not exist, and remove files that cannot be reused.

    Files can be reused if they are complete and were written for the same plan.

    Args:
        folder: The folder.
        plan: Everything that the shards depend on.
    """
    path, text = folder / "plan", json.dumps(plan)
    folder.mkdir(exist_ok=True)
    previous = path.read_text() if path.exists() else None
    for file in folder.iterdir():
        if previous != text or file.suffix == ".partial":
            file.unlink()
    path.write_text(text)


def completed_records(folder: Path, count: int) -> dict[int, ShardRecord]:
    """Return the records of all complete shards with numbers below `count`, as a dict from number to record."""
    found = {number: read_shard_record(folder, number) for number in range(count)}
    return {number: record for number, record in found.items() if record}


def create_memmap(path: Path, dtype: npt.DTypeLike, count: int) -> np.memmap[Any, Any]:
    """Create a file and map it into memory for writing.

    The disk space is allocated first, because writing to a mapped page on a full disk would kill the process.

    Args:
        path: The path of the file.
        dtype: The type of the entries.
        count: The number of entries.

    Returns:
        The memory map of the file.

    Raises:
        OSError: There is not enough disk space.
    """
    size = max(count, 1) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype, "r+")


def remove_folder(path: Path) -> None:
    """Remove a folder and its content if it exists."""
    shutil.rmtree(path, ignore_errors=True)
