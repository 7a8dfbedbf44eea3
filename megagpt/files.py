"""Durable file operations for run directories.

Every write goes through these few functions, so that tests can make each one fail, kill the process there, or count it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WriteFile = Callable[[str, bytes], None]
"""writes one file of a checkpoint, given its path relative to the checkpoint and its content"""


@dataclass(frozen=True)
class WrittenFile:
    """Size and CRC-32 of a file that was written."""

    bytes: int
    crc32: int


def write(path: Path, data: bytes) -> WrittenFile:
    """Write a new file and flush it to disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return WrittenFile(len(data), zlib.crc32(data))


def folder_writer(folder: Path) -> WriteFile:
    """Return a function that writes files into a folder and creates missing folders."""

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
    """Replace a file atomically by a JSON value."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def rename(old: Path, new: Path) -> None:
    """Rename a folder. The new name is durable only after `sync` of the parent folder."""
    os.rename(old, new)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless they exist."""
    path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and everything in it.

    It is renamed first, so that its name is free even if the removal is interrupted.
    """
    if path.exists():
        doomed = path.with_name(f".removed_{path.name.lstrip('.')}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


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
        """Append bytes."""
        self._file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)

    def sync(self) -> None:
        """Flush the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is buffered, and close the file. Raises OSError if the disk is full."""
        self._file.close()
