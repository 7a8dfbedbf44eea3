"""One piece of the input to one shard."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.documents import Fragment, digest_of, in_validation, whole
from megagpt.data.encoder import CachedEncoder
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
        marks = {"\0": "nul", "\u2581": "lower_blocks"} | dict.fromkeys(tokenizer.control_symbols, "control_symbols")
        self._marks = {mark.encode(): kind for mark, kind in marks.items()}

    def encode(self, piece: Piece, report: Report) -> Record:
        """Write the piece's shard. Raises PieceError."""
        odd = Oddities(self._job.strict)
        self._check.begin()
        try:
            with _no_collecting(), ShardWriter(self._job.folder, piece.number) as shard:
                sink = _Documents(shard, self._encoder, self._job.validation_fraction, odd)
                for stretch in piece.stretches:
                    fragments = read(stretch, self._job.text_key, odd, self._job.folder)
                    for batch in _batches(fragments if self._encoder.is_word_local else whole(fragments)):
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
        texts = [fragment.text for fragment in batch]
        try:
            raws = list(map(str.encode, texts))
        except UnicodeEncodeError:
            for number, fragment in enumerate(batch):
                texts[number], count = replace_surrogates(fragment.text)
                odd.note("lone_surrogates", Place(source, fragment.line), count)
            raws = list(map(str.encode, texts))
        together = b"".join(raws)
        for mark, kind in self._marks.items():
            if mark in together:  # so seldom that the common case must not look at each text
                for fragment, raw in zip(batch, raws, strict=True):
                    odd.note(kind, Place(source, fragment.line), raw.count(mark))
        encoded = self._encoder.encode(texts)
        self._check.look(texts, (Place(source, fragment.line) for fragment in batch), encoded)
        for fragment, raw, ids in zip(batch, raws, encoded, strict=True):
            documents.add(fragment, source, raw, ids)


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

    def __init__(self, shard: ShardWriter, encoder: CachedEncoder, fraction: float, odd: Oddities) -> None:
        self._shard, self._fraction, self._odd = shard, fraction, odd
        self._end, self._width = encoder.end, encoder.width
        self._begun: tuple[hashlib._Hash, int, int, bool] | None = None  # a document's hash, sizes, if blank so far

    def add(self, fragment: Fragment, source: int, raw: bytes, ids: bytes) -> None:
        """Append a fragment with its text in UTF-8 and its ids."""
        md5, text_bytes, id_bytes, blank = self._begun or (hashlib.md5(usedforsecurity=False), 0, 0, True)
        md5.update(raw)
        text_bytes += len(raw)
        id_bytes += len(ids)
        blank = blank and (not raw or fragment.text.isspace())
        self._shard.write(ids)
        if not fragment.last:
            self._begun = md5, text_bytes, id_bytes, blank
            return
        self._begun = None
        if id_bytes:
            self._shard.write(self._end)
            id_bytes += self._width
        tokens = id_bytes // self._width
        if blank:
            self._odd.note("blank" if text_bytes else "empty", Place(source, fragment.line))
        if tokens > MAX_SEQUENCE:
            self._odd.note("long", Place(source, fragment.line))
        digest = md5.digest()
        held_out = in_validation(digest_of(fragment.key) if fragment.key else digest, self._fraction)
        self._shard.end_document(tokens, text_bytes, held_out, digest)

    def done(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text so far; of a document that has not ended, too."""
        _, text_bytes, id_bytes, _ = self._begun or (None, 0, 0, True)
        tokens = self._shard.tokens + id_bytes // self._width
        return self._shard.documents, tokens, self._shard.text_bytes + text_bytes


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
