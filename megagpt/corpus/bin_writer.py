"""Writes the .bin file of a corpus, with a checksum for each 64 MiB range. Several processes can write one file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from megagpt.corpus.crc32 import combine_crc32

_RANGE = 1 << 26  # number of bytes of .bin per checksum
ChecksummedRanges = list[tuple[int, int]]
"""Consecutive ranges of a file, each given by its length in bytes and its CRC-32."""


class BinWriter:
    """Writer of a new .bin file, or of one part of a .bin file that several processes write.

    The ranges of every writer end at multiples of 64 MiB in the whole file, so that `merge_ranges` can join the ranges
    of several writers.

    Args:
        path: path of the file.
        start: byte offset at which this writer starts in an existing file. If None, a new file is created.
    """

    def __init__(self, path: Path, start: int | None = None) -> None:
        self._file = path.open("wb" if start is None else "r+b")
        self._file.seek(start or 0)
        self._range_left = _RANGE - (start or 0) % _RANGE
        self._ranges: ChecksummedRanges = []
        self._range_bytes = 0
        self._range_crc32 = 0

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, ids: bytes | memoryview) -> None:
        """Append ids, given as the bytes of .bin."""
        view = memoryview(ids)
        while len(view) >= self._range_left:
            end = self._range_left
            self._append(view[:end])
            view = view[end:]
            self._end_range()
        self._append(view)

    def finish(self) -> ChecksummedRanges:
        """Flush the file to disk, and return the ranges that this writer has written."""
        self._end_range()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._ranges

    def _append(self, ids: memoryview) -> None:
        self._file.write(ids)
        self._range_crc32 = zlib.crc32(ids, self._range_crc32)
        self._range_bytes += len(ids)
        self._range_left -= len(ids)

    def _end_range(self) -> None:
        if self._range_bytes:
            self._ranges.append((self._range_bytes, self._range_crc32))
        self._range_bytes = 0
        self._range_crc32 = 0
        if self._range_left == 0:
            self._range_left = _RANGE


def merge_ranges(parts: Iterable[tuple[int, int]]) -> ChecksummedRanges:
    """Merge the ranges of several writers, in file order, into the 64 MiB ranges of the whole file."""
    ranges: ChecksummedRanges = []
    size = 0
    checksum = 0
    for part_size, part_crc32 in parts:
        size += part_size
        checksum = combine_crc32(checksum, part_crc32, part_size)
        if size == _RANGE:
            ranges.append((size, checksum))
            size = 0
            checksum = 0
    if size:
        ranges.append((size, checksum))
    return ranges
