"""What of the input a tokenizer is trained and measured on, drawn by one process or by several: the same either way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from megagpt.data.documents import Fragment, digest_of, in_validation
from megagpt.data.oddities import Oddities
from megagpt.data.pieces import Piece, cut
from megagpt.data.reading import read
from megagpt.data.sample import Sample
from megagpt.data.sources import Source
from megagpt.data.tokenizer import SAMPLE_BYTES, training_lines, without_surrogates
from megagpt.prepare.encoding import PieceError, Report
from megagpt.prepare.pool import Task, results

_MEASURED = 1_000_000  # bytes of text that quality is measured on
_HEAD = _MEASURED // 4  # characters of a document that count there: a character has 4 bytes at most


@dataclass
class Drawn:
    """Lines to train on, and documents to measure on, which are among those trained on (`seen`) or are not.

    `documents` are those that may be trained on, and `text_bytes` are theirs.
    """

    lines: Sample = field(default_factory=lambda: Sample(SAMPLE_BYTES))
    seen: Sample = field(default_factory=lambda: Sample(_MEASURED))
    unseen: Sample = field(default_factory=lambda: Sample(_MEASURED))
    documents: int = 0
    text_bytes: int = 0

    def add(self, other: Drawn) -> None:
        """Take in what another process drew."""
        self.lines.add(other.lines)
        self.seen.add(other.seen)
        self.unseen.add(other.unseen)
        self.documents += other.documents
        self.text_bytes += other.text_bytes


def drawn_from(sources: Sequence[Source], key: tuple[str, ...], fraction: float, workers: int) -> Drawn:
    """Draw from all documents but those that `prepare` would put aside at this fraction.

    Memory does not grow with the input. Raises UserError for input that cannot be read.
    """
    pieces, drawn = cut(sources), Drawn()
    tasks = (Task(piece, (drawn.lines.below, drawn.seen.below, drawn.unseen.below)) for piece in pieces)
    try:
        for more in results(partial(_drawer, key, fraction), tasks, min(workers, len(pieces)), lambda *_: None):
            drawn.add(more)
    except PieceError as failure:
        raise failure.cause from None
    return drawn


def _drawer(key: tuple[str, ...], fraction: float) -> Callable[[Task, Report], Drawn]:
    def draw(task: Task, report: Report) -> Drawn:
        try:
            return _drawn(task, key, fraction)
        except Exception as error:
            raise PieceError(task.piece.number, error) from error

    return draw


def _drawn(task: Task, key: tuple[str, ...], fraction: float) -> Drawn:
    below = task.given
    drawn = Drawn(Sample(SAMPLE_BYTES, below[0]), Sample(_MEASURED, below[1]), Sample(_MEASURED, below[2]))
    document = _Document(drawn, fraction, task.piece.number)
    for fragment in _fragments(task.piece, key):
        document.add(fragment)
    return drawn


def _fragments(piece: Piece, key: tuple[str, ...]) -> Iterator[Fragment]:
    for stretch in piece.stretches:
        yield from read(stretch, key, Oddities())


class _Document:
    """The document that is read. What is drawn of it counts at its end, whose hash says whether it is trained on."""

    def __init__(self, drawn: Drawn, fraction: float, piece: int) -> None:
        self._drawn, self._fraction, self._piece = drawn, fraction, piece
        self._document = self._line = 0
        self._begin()

    def add(self, fragment: Fragment) -> None:
        text = without_surrogates(fragment.text)
        raw = text.encode()
        self._hash.update(raw)
        self._bytes += len(raw)
        self._head += text[: _HEAD - len(self._head)]
        for line in training_lines(text):
            self._lines.offer((self._piece, self._line), line)
            self._line += 1
        if fragment.last:
            self._end(fragment.key)

    def _begin(self) -> None:
        self._hash = hashlib.md5(usedforsecurity=False)
        self._head, self._bytes = "", 0
        self._lines = Sample(self._drawn.lines.limit, self._drawn.lines.below)

    def _end(self, key: str) -> None:
        held_out = in_validation(digest_of(key) if key else self._hash.digest(), self._fraction)
        (self._drawn.unseen if held_out else self._drawn.seen).offer((self._piece, self._document), self._head)
        self._document += 1
        if not held_out:
            self._drawn.lines.add(self._lines)
            self._drawn.documents += 1
            self._drawn.text_bytes += self._bytes
        self._begin()
