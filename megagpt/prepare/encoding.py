"""One piece of the input to one shard."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.documents import Fragment, digest_of, in_validation, whole
from megagpt.data.encoder import Encoder
from megagpt.data.indexed_writer import MAX_SEQUENCE
from megagpt.data.oddities import Oddities, Place
from megagpt.data.pieces import Piece
from megagpt.data.reading import read
from megagpt.data.shards import Record, ShardWriter
from megagpt.data.tokenizer import Tokenizer, replace_surrogates
from megagpt.errors import MachineError
from megagpt.prepare.engines import EngineCheck, encoder_of

_BATCH, _BATCH_DOCUMENTS = 1 << 19, 4096  # characters, and documents, encoded at a time at most

Counts = tuple[int, int, int, int]
Report = Callable[[int, int, int, int], None]
"""Is told of so many more documents, tokens, bytes of text, and bytes of input that is done."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    folder: Path
    tokenizer: Tokenizer
    validation_fraction: float
    text_key: tuple[str, ...]
    strict: bool
    engine: str


class PieceError(Exception):
    """A piece that could not be encoded, and why."""

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(number, cause)
        self.number, self.cause = number, cause


class PieceEncoder:
    """Encodes pieces one after the other, keeping the tokenizer and its memo."""

    def __init__(self, job: Job) -> None:
        self._job = job
        tokenizer = job.tokenizer
        self._encoder = encoder_of(job.engine, tokenizer)
        self._check = EngineCheck(job.engine, tokenizer)
        self._marks = {"\0": "nul", "\u2581": "lower_blocks"}
        self._marks |= dict.fromkeys(tokenizer.control_symbols, "control_symbols")

    def encode(self, piece: Piece, report: Report) -> Record:
        """Write the piece's shard. Raises PieceError."""
        odd = Oddities(self._job.strict)
        self._check.begin()
        try:
            with _no_collecting(), ShardWriter(self._job.folder, piece.number) as shard:
                sink = _Documents(shard, self._encoder, self._job.validation_fraction, odd)
                for stretch in piece.stretches:
                    fragments = read(stretch, self._job.text_key, odd, self._job.folder)
                    for batch in _batches(fragments if self._encoder.by_words else whole(fragments)):
                        before = sink.done()
                        self._add(batch, stretch.number, sink, odd)
                        shard.flush()
                        documents, tokens, text = (new - old for new, old in zip(sink.done(), before, strict=True))
                        report(documents, tokens, text, 0)
                record = shard.finish(odd)
                report(0, 0, 0, piece.size)
                return record
        except OSError as error:
            raise PieceError(piece.number, cannot_write(error, self._job.folder)) from None
        except Exception as error:
            raise PieceError(piece.number, error) from error

    def _add(self, batch: list[Fragment], source: int, documents: _Documents, odd: Oddities) -> None:
        places = [Place(source, fragment.line) for fragment in batch]
        raws: list[bytes] = []
        texts: list[str] = []
        for fragment, place in zip(batch, places, strict=True):
            text = fragment.text
            try:
                raws.append(text.encode())
            except UnicodeEncodeError:
                text, count = replace_surrogates(text)
                odd.note("lone_surrogates", place, count)
                raws.append(text.encode())
            texts.append(text)
        together = "".join(texts)
        for mark in self._marks:
            if mark in together:  # so seldom that the common case must not look at each text
                for text, place in zip(texts, places, strict=True):
                    odd.note(self._marks[mark], place, text.count(mark))
        encoded = self._encoder.encode(texts)
        self._check.look(texts, places, encoded)
        for fragment, place, raw, ids in zip(batch, places, raws, encoded, strict=True):
            documents.add(fragment, place, raw, ids)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """No search for cycles of objects: there are none here, and looking at each list of words costs time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class _Documents:
    """Puts encoded fragments together into the documents of a shard."""

    def __init__(self, shard: ShardWriter, encoder: Encoder, fraction: float, odd: Oddities) -> None:
        self._shard, self._encoder, self._fraction, self._odd = shard, encoder, fraction, odd
        self._blank = True
        self._begin()

    def add(self, fragment: Fragment, place: Place, raw: bytes, ids: bytes) -> None:
        """Append a fragment with its text in UTF-8 and its ids."""
        self._shard.write(ids)
        self._hash.update(raw)
        self._text_bytes += len(raw)
        self._id_bytes += len(ids)
        self._blank = self._blank and (not raw or fragment.text.isspace())
        if fragment.last:
            self._end(fragment.key, place)

    def done(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text so far; of a document that has not ended, too."""
        tokens = self._shard.tokens + self._id_bytes // self._encoder.width
        return self._shard.documents, tokens, self._shard.text_bytes + self._text_bytes

    def _begin(self) -> None:
        self._hash = hashlib.md5(usedforsecurity=False)
        self._text_bytes = self._id_bytes = 0
        self._blank = True

    def _end(self, key: str, place: Place) -> None:
        if self._id_bytes:
            self._shard.write(self._encoder.end)
            self._id_bytes += self._encoder.width
        if self._blank:
            self._odd.note("blank" if self._text_bytes else "empty", place)
        tokens = self._id_bytes // self._encoder.width
        self._odd.note("long", place, tokens > MAX_SEQUENCE)
        digest = self._hash.digest()
        held_out = in_validation(digest_of(key) if key else digest, self._fraction)
        self._shard.end_document(tokens, self._text_bytes, held_out, digest)
        self._begin()


def _batches(fragments: Iterator[Fragment]) -> Iterator[list[Fragment]]:
    batch: list[Fragment] = []
    size = 0
    for fragment in fragments:
        batch.append(fragment)
        size += len(fragment.text)
        if size >= _BATCH or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cannot_write(error: OSError, folder: Path) -> MachineError:
    """The failure to write, in the user's words."""
    do = "make room or choose another --output, then type the command again: it goes on where it stopped"
    return MachineError(f"cannot write: {error.strerror}", str(error.filename or folder), do)
