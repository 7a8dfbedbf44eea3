"""Writes .bin, alone or one of several that write it together, with checksums of its stretches."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from megagpt.data.checksums import joined

_STRETCH = 1 << 26  # bytes of .bin that have a checksum of their own
ChecksummedRanges = list[tuple[int, int]]
"""Bytes, and CRC-32, of stretches one after the other."""


class BinWriter:
    """A new .bin; or, at byte `start` of one that is there, what this writer writes of it.

    ChecksummedRanges end where the whole file's do, whoever writes: those of several writers go together.
    """

    def __init__(self, path: Path, start: int | None = None) -> None:
        self._file = path.open("wb" if start is None else "r+b")
        self._file.seek(start or 0)
        self._room = _STRETCH - (start or 0) % _STRETCH
        self._stretches: ChecksummedRanges = []
        self._begun = self._crc32 = 0  # of the stretch that is written

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, ids: bytes | memoryview) -> None:
        """Append ids in the type of .bin."""
        view = memoryview(ids)
        while len(view) >= (room := self._room):
            self._append(view[:room])
            view = view[room:]
            self._end_stretch()
        self._append(view)

    def finish(self) -> ChecksummedRanges:
        """Have it on the disk; what was written."""
        self._end_stretch()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._stretches

    def _append(self, ids: memoryview) -> None:
        self._file.write(ids)
        self._crc32 = zlib.crc32(ids, self._crc32)
        self._begun += len(ids)
        self._room -= len(ids)

    def _end_stretch(self) -> None:
        if self._begun:
            self._stretches.append((self._begun, self._crc32))
        self._begun = self._crc32 = 0
        self._room = self._room or _STRETCH


def merge_ranges(parts: Iterable[tuple[int, int]]) -> ChecksummedRanges:
    """The stretches of a file out of what its writers wrote, in their order."""
    whole: ChecksummedRanges = []
    size = checksum = 0
    for more, crc32 in parts:
        size, checksum = size + more, joined(checksum, crc32, more)
        if size == _STRETCH:
            whole.append((size, checksum))
            size = checksum = 0
    return [*whole, (size, checksum)] if size else whole
