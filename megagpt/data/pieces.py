"""The input cut into pieces of work. The cut depends on the input alone, not on who does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megagpt.data.opening import Compression
from megagpt.data.parquet import row_groups
from megagpt.data.sniffing import Kind
from megagpt.data.sources import Source

_SMALLEST, _LARGEST, _PIECES = 4 << 20, 64 << 20, 4096  # bytes of input in a piece, and about how many there are


@dataclass(frozen=True)
class Stretch:
    """Part of a file, the `number`-th of the input: the lines that begin in its bytes `start` to `end`, or its row
    groups so far; or, `end` being None, all of it.
    """

    number: int
    source: Source
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        if self.end is None:
            return self.source.path
        what = "row groups" if self.source.kind is Kind.PARQUET else "bytes"
        return f"{self.source.path}, {what} {self.start:,} to {self.end:,}"


@dataclass(frozen=True)
class Piece:
    """Stretches that are encoded together, in this order, into one shard; about `size` bytes of input."""

    number: int
    stretches: tuple[Stretch, ...]
    size: int

    def __str__(self) -> str:
        first, *others = self.stretches
        return f"{first.source.path} and {len(others)} files after it" if others else str(first)


def cut(sources: Sequence[Source]) -> list[Piece]:
    """Cut the input, in its order: large files of lines or rows into several pieces, small files together into one.

    A piece belongs to one corpus.
    """
    total = sum(source.size for source in sources)
    size = min(max(total // _PIECES, _SMALLEST), _LARGEST)
    pieces: list[Piece] = []
    waiting: list[Stretch] = []
    held = 0
    for stretch, length in _stretches(sources, size):
        if waiting and (held + length > size or stretch.source.corpus != waiting[0].source.corpus):
            pieces.append(Piece(len(pieces), tuple(waiting), held))
            waiting, held = [], 0
        waiting.append(stretch)
        held += length
    return [*pieces, Piece(len(pieces), tuple(waiting), held)] if waiting else pieces


def _stretches(sources: Sequence[Source], size: int) -> Iterator[tuple[Stretch, int]]:
    """Stretches and about how many bytes each has."""
    for number, source in enumerate(sources):
        in_parts = source.in_parts and source.compression is Compression.NONE and source.kind is not Kind.TEXT
        if source.size <= size or not in_parts:
            yield Stretch(number, source), source.size
        elif source.kind is Kind.PARQUET:
            groups = row_groups(source.path)
            step = max(1, groups * size // source.size)
            for start in range(0, groups, step):
                end = min(start + step, groups)
                yield Stretch(number, source, start, end), source.size * (end - start) // groups
        else:
            for start in range(0, source.size, size):
                end = min(start + size, source.size)
                yield Stretch(number, source, start, end), end - start
