"""The input cut into pieces of work. The cut depends on the input alone, not on who does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megagpt.data.opening import Compression
from megagpt.data.parquet import count_row_groups
from megagpt.data.sniffing import FileFormat
from megagpt.data.sources import InputFile

_SMALLEST, _LARGEST, _PIECES = 4 << 20, 64 << 20, 4096  # bytes of input in a piece, and about how many there are


@dataclass(frozen=True)
class InputRange:
    """Part of a file, the `number`-th of the input: the lines that begin in its bytes `start` to `end`, or its row
    groups so far; or, `end` being None, all of it.
    """

    number: int
    source: InputFile
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        if self.end is None:
            return self.source.path
        what = "row groups" if self.source.kind is FileFormat.PARQUET else "bytes"
        return f"{self.source.path}, {what} {self.start:,} to {self.end:,}"


@dataclass(frozen=True)
class Chunk:
    """Stretches that are encoded together, in this order, into one shard; about `size` bytes of input."""

    number: int
    stretches: tuple[InputRange, ...]
    size: int

    def __str__(self) -> str:
        first, *others = self.stretches
        return f"{first.source.path} and {len(others)} files after it" if others else str(first)


def split_into_chunks(sources: Sequence[InputFile]) -> list[Chunk]:
    """Cut the input, in its order: large files of lines or rows into several pieces, small files together into one.

    A piece belongs to one corpus.
    """
    total = sum(source.size for source in sources)
    size = min(max(total // _PIECES, _SMALLEST), _LARGEST)
    pieces: list[Chunk] = []
    waiting: list[InputRange] = []
    held = 0
    for stretch, length in _stretches(sources, size):
        if waiting and (held + length > size or stretch.source.corpus != waiting[0].source.corpus):
            pieces.append(Chunk(len(pieces), tuple(waiting), held))
            waiting, held = [], 0
        waiting.append(stretch)
        held += length
    return [*pieces, Chunk(len(pieces), tuple(waiting), held)] if waiting else pieces


def _stretches(sources: Sequence[InputFile], size: int) -> Iterator[tuple[InputRange, int]]:
    """Stretches and about how many bytes each has."""
    for number, source in enumerate(sources):
        in_parts = source.in_parts and source.compression is Compression.NONE and source.kind is not FileFormat.TEXT
        if source.size <= size or not in_parts:
            yield InputRange(number, source), source.size
        elif source.kind is FileFormat.PARQUET:
            groups = count_row_groups(source.path)
            step = max(1, groups * size // source.size)
            for start in range(0, groups, step):
                end = min(start + step, groups)
                yield InputRange(number, source, start, end), source.size * (end - start) // groups
        else:
            for start in range(0, source.size, size):
                end = min(start + size, source.size)
                yield InputRange(number, source, start, end), end - start
