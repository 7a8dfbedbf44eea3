"""Durable file operations for run directories.

All writes go through these few functions, so that tests can count them, make each one fail, or kill the process there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import UserError

WriteFile = Callable[[str, bytes], None]
"""Function that writes one file, given its path relative to the checkpoint and its content."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from an untrusted source.

    Raises:
        ValueError: The text is not JSON, or it is nested too deeply for Python's parser. In the second case
            `json.loads` raises RecursionError, which callers that handle damaged files do not catch.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


@dataclass(frozen=True)
class WrittenFile:
    """Size and CRC-32 of a file that was written."""

    bytes: int
    crc32: int


def write(path: Path, data: bytes) -> WrittenFile:
    """Write a new file and flush it to disk. Raises OSError if this fails, or if the path is a symbolic link."""
    descriptor = _opened(path, os.O_TRUNC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return WrittenFile(len(data), zlib.crc32(data))


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to a file, which is created if missing. Raises OSError for a symbolic link."""
    return _opened(path, os.O_APPEND)


def _opened(path: Path, flag: int) -> int:
    """Open a file for writing, and return its descriptor. Raises OSError if the file is a symbolic link.

    In the run directory of another user, a symbolic link could point to any file.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | flag | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise OSError(errno.ELOOP, "this is a symbolic link, which is not written through", str(path))


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path is outside of a folder after all symbolic links are resolved."""
    return not path.resolve().is_relative_to(folder.resolve())


def refuse_links_out(run: Path) -> None:
    """Raise UserError if the run directory or its folder `logs` contains a symbolic link that leads out of it."""
    entries = [path for folder in (run, run / "logs") if folder.is_dir() for path in folder.iterdir()]
    for path in sorted(entries):
        if path.is_symlink() and leads_out(path, run):
            what = "a symbolic link leads out of the run directory, and is not written through"
            raise UserError(what, f"{path} -> {path.readlink()}", "remove it, or put the file itself in its place")


def folder_writer(folder: Path) -> WriteFile:
    """Return a function that writes files into a folder and creates missing subfolders."""

    def sink(name: str, data: bytes) -> None:
        make_folder((folder / name).parent)
        write(folder / name, data)

    return sink


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically, so that a reader sees either the old content or the new."""
    temporary = path.with_name(path.name + ".new")
    write(temporary, text.encode("utf-8"))
    os.replace(temporary, path)
    sync(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """Replace the content of a file atomically with a JSON value."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def rename(old: Path, new: Path) -> None:
    """Rename a folder. The new name is durable only after `sync` is called for the parent folder."""
    os.rename(old, new)


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist."""
    path.mkdir(parents=True, exist_ok=True)


def make_run_folder(path: Path) -> None:
    """Create a folder of a run directory. Raises UserError if it cannot be created or written to."""
    do = "set run_dir to a directory that you may write to"
    try:
        make_folder(path)
    except OSError as error:
        raise UserError(f"the run directory cannot be created: {error.strerror}", str(path), do) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError("the run directory cannot be written to", str(path), do)


def remove_folder(path: Path) -> None:
    """Remove a folder and everything in it.

    The folder is renamed first, so that its name is free even if the removal is interrupted.
    """
    if path.is_symlink():  # Remove only the link, because its target may belong to another user.
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".removed_{path.name.lstrip('.')}")
        remove_tree(doomed)
        os.rename(path, doomed)
        remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, if it exists. If it is a symbolic link, remove only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file or folder from the page cache to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


class ChecksummedFile:
    """A new file that computes the CRC-32 of everything written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.crc32 = 0

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes to the file."""
        self._file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)

    def sync(self) -> None:
        """Flush the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write buffered data and close the file. Raises OSError if the disk is full."""
        self._file.close()
