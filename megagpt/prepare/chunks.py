"""Splits the input into chunks, the units of work. The split depends only on the input, not on the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megagpt.prepare.readers.decompress import Compression
from megagpt.prepare.readers.file_type import FileFormat
from megagpt.prepare.readers.inputs import InputFile
from megagpt.prepare.readers.parquet import count_row_groups

_MIN_BYTES = 4 << 20  # minimum chunk size, in bytes of input
_MAX_BYTES = 64 << 20  # maximum chunk size, in bytes of input
_TARGET_CHUNKS = 4096  # approximate number of chunks, unless the minimum or maximum size applies


@dataclass(frozen=True)
class InputRange:
    """Part of an input file: the lines that begin in a range of bytes, or a range of row groups.

    Attributes:
        index: The file's index in the input.
        file: The file.
        start: The first byte or row group of the range.
        end: The byte or row group after the last one. If None, the range extends to the end of the file.
    """

    index: int
    file: InputFile
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        if self.end is None:
            return self.file.path
        unit = "row groups" if self.file.format is FileFormat.PARQUET else "bytes"
        return f"{self.file.path}, {unit} {self.start:,} to {self.end:,}"


@dataclass(frozen=True)
class Chunk:
    """Ranges of the input that are encoded, in this order, into one shard. `size` is their approximate total in bytes.

    The number of the chunk is also the number of its shard.
    """

    number: int
    ranges: tuple[InputRange, ...]
    size: int

    def __str__(self) -> str:
        first, *others = self.ranges
        if not others:
            return str(first)
        return f"{first.file.path} and the next {len(others)} file{'s' if len(others) > 1 else ''}"


def split_into_chunks(files: Sequence[InputFile]) -> list[Chunk]:
    """Split the input into chunks, in the order of the input.

    Large files of lines or rows are split into several chunks, and small files are combined into one. All files of a
    chunk belong to the same corpus.
    """
    total = sum(file.size for file in files)
    chunk_size = min(max(total // _TARGET_CHUNKS, _MIN_BYTES), _MAX_BYTES)
    chunks: list[Chunk] = []
    ranges: list[InputRange] = []  # ranges collected for the next chunk
    ranges_size = 0
    for new_range, size in _split_into_ranges(files, chunk_size):
        if ranges and (ranges_size + size > chunk_size or new_range.file.corpus != ranges[0].file.corpus):
            chunks.append(Chunk(len(chunks), tuple(ranges), ranges_size))
            ranges = []
            ranges_size = 0
        ranges.append(new_range)
        ranges_size += size
    if ranges:
        chunks.append(Chunk(len(chunks), tuple(ranges), ranges_size))
    return chunks


def _split_into_ranges(files: Sequence[InputFile], chunk_size: int) -> Iterator[tuple[InputRange, int]]:
    """Yield the ranges of all files, each with its approximate size in bytes.

    Files that can be split are divided into ranges of about `chunk_size` bytes.
    """
    for index, file in enumerate(files):
        can_split = file.supports_ranges and file.compression is Compression.NONE and file.format is not FileFormat.TEXT
        if file.size <= chunk_size or not can_split:
            yield InputRange(index, file), file.size
        elif file.format is FileFormat.PARQUET:
            groups = count_row_groups(file.path)
            step = max(1, groups * chunk_size // file.size)
            for start in range(0, groups, step):
                end = min(start + step, groups)
                yield InputRange(index, file, start, end), file.size * (end - start) // groups
        else:
            for start in range(0, file.size, chunk_size):
                end = min(start + chunk_size, file.size)
                yield InputRange(index, file, start, end), end - start
