"""Every write of a run directory, through a few calls that can fail, be killed, or be counted one by one."""

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
"""Writes the bytes of one file of a checkpoint, named relative to it."""


@dataclass(frozen=True)
class WrittenFile:
    """What a file holds: its size and CRC-32."""

    bytes: int
    crc32: int


def write(path: Path, data: bytes) -> WrittenFile:
    """Write a new file and flush it to the disk. Raises OSError."""
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
    """Writes files into a folder, those above them made."""

    def sink(name: str, data: bytes) -> None:
        make_folder((folder / name).parent)
        write(folder / name, data)

    return sink


def replace_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    write(temporary, text.encode("utf-8"))
    os.replace(temporary, path)
    sync(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """Replace the file by a JSON value, in one step."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def rename(old: Path, new: Path) -> None:
    """Rename a folder; it is on the disk when the folder above has been synced."""
    os.rename(old, new)


def make_folder(path: Path) -> None:
    """Make a folder and those above it."""
    path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it: from then on its old name is free, whatever stops the rest."""
    if path.exists():
        doomed = path.with_name(f".removed_{path.name.lstrip('.')}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Flush a file's or folder's entry from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


class ChecksummedFile:
    """A new file that keeps the CRC-32 of all that was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.crc32 = 0

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, content: bytes | memoryview) -> None:
        """Append some bytes."""
        self._file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)

    def sync(self) -> None:
        """Flush it to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it; what is buffered is written, unless the disk is full."""
        self._file.close()
