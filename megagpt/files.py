"""Every write of a run directory, through a few calls that can fail, be killed, or be counted one by one."""

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

Write = Callable[[str, bytes], None]
"""Writes the bytes of one file of a checkpoint, named relative to it."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text that may come from anybody.

    Raises:
        ValueError: The text is not JSON, or nests deeper than Python's parser goes. `json.loads` alone raises
            RecursionError for the latter, which callers that expect a damaged file do not catch.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


@dataclass(frozen=True)
class Written:
    """What a file holds: its size and CRC-32."""

    bytes: int
    crc32: int


def write(path: Path, data: bytes) -> Written:
    """Write a new file and flush it to the disk. Raises OSError."""
    descriptor = _opened(path, os.O_TRUNC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(len(data), zlib.crc32(data))


def open_to_append(path: Path) -> int:
    """Return a file descriptor that appends to a file, made if it is not there. Raises OSError for a symbolic link."""
    return _opened(path, os.O_APPEND)


def _opened(path: Path, flag: int) -> int:
    """Open a file to write, unless it is a symbolic link: in a run directory of others it could lead anywhere."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | flag | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise OSError(errno.ELOOP, "this is a symbolic link, which is not written through", str(path))


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path, with all symbolic links followed, is outside of a folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def refuse_links_out(run: Path) -> None:
    """Raise UserError if the run directory or its logs hold a symbolic link that leads out of it."""
    entries = [path for folder in (run, run / "logs") if folder.is_dir() for path in folder.iterdir()]
    for path in sorted(entries):
        if path.is_symlink() and leads_out(path, run):
            what = "a symbolic link leads out of the run directory, and is not written through"
            raise UserError(what, f"{path} -> {path.readlink()}", "remove it, or put the file itself in its place")


def into(folder: Path) -> Write:
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
    if path.is_symlink():  # only the link: what it leads to may not be ours
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".removed_{path.name.lstrip('.')}")
        remove_tree(doomed)
        os.rename(path, doomed)
        remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there; of a symbolic link the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


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
