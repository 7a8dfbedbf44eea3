"""The input cut into pieces of work. The cut depends on the input alone, not on who does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megagpt.data.sources import Kind, Source

_SMALLEST, _LARGEST, _PIECES = 4 << 20, 64 << 20, 4096  # bytes of input in a piece, and about how many there are


@dataclass(frozen=True)
class Stretch:
    """A file of the input, or bytes `start` to `end` of one: the lines that begin there."""

    source: int
    path: str
    kind: Kind
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """Stretches that are encoded together, in this order, into one shard."""

    number: int
    stretches: tuple[Stretch, ...]

    def __str__(self) -> str:
        first, *others = self.stretches
        if others:
            return f"{first.path} and {len(others)} files after it"
        return first.path + (f", bytes {first.start:,} to {first.end:,}" if first.kind is Kind.LINES else "")


def cut(sources: Sequence[Source]) -> list[Piece]:
    """Cut the input, in its order: large files of lines into several pieces, small files together into one."""
    total = sum(source.size for source in sources)
    size = min(max(total // _PIECES, _SMALLEST), _LARGEST)
    pieces: list[Piece] = []
    waiting: list[Stretch] = []
    held = 0
    for stretch in _stretches(sources, size):
        length = stretch.end - stretch.start
        if waiting and held + length > size:
            pieces.append(Piece(len(pieces), tuple(waiting)))
            waiting, held = [], 0
        waiting.append(stretch)
        held += length
    return [*pieces, Piece(len(pieces), tuple(waiting))] if waiting else pieces


def _stretches(sources: Sequence[Source], size: int) -> Iterator[Stretch]:
    for number, source in enumerate(sources):
        step = size if source.kind is Kind.LINES else max(source.size, 1)
        for start in range(0, max(source.size, 1), step):
            yield Stretch(number, source.path, source.kind, start, min(start + step, source.size))
