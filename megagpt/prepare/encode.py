"""Encodes one chunk of the input to one shard: reads, tokenizes, and assigns documents to training or validation."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megagpt.corpus.writer import MAX_SEQUENCE
from megagpt.errors import MachineError
from megagpt.prepare.chunks import Chunk
from megagpt.prepare.engines import EngineCheck, create_encoder
from megagpt.prepare.input_warnings import InputLocation, InputWarnings
from megagpt.prepare.readers.documents import TextFragment, is_validation, join_fragments, text_digest
from megagpt.prepare.readers.reader import read_fragments
from megagpt.prepare.shards import ShardRecord, ShardWriter
from megagpt.tokenizer.cached_encoder import CachedEncoder
from megagpt.tokenizer.tokenizer import Tokenizer, replace_surrogates

_BATCH_CHARACTERS = 1 << 19  # a batch is encoded once it has this many characters
_BATCH_DOCUMENTS = 4096  # maximum number of documents or fragments per batch

ProgressCallback = Callable[[int, int, int, int], None]
"""Function that receives the progress since its last call.

Its arguments are numbers of documents, tokens, bytes of text, and bytes of input in completed chunks.
"""


@dataclass(frozen=True)
class EncodeJob:
    """Settings that all workers need to encode chunks.

    Attributes:
        folder: The folder of the shards.
        tokenizer: The tokenizer.
        validation_fraction: The fraction of the documents that are assigned to the validation part.
        text_key: The keys that lead to the text in a JSON line or table row, outermost first.
        strict: If True, raise an error at the first unusual input instead of counting warnings.
        engine: The tokenizer implementation, see `engines.ENGINES`.
    """

    folder: Path
    tokenizer: Tokenizer
    validation_fraction: float
    text_key: tuple[str, ...]
    strict: bool
    engine: str


class ChunkError(Exception):
    """Error while processing the chunk `number`. The original exception is `cause`."""

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(number, cause)
        self.number, self.cause = number, cause


class ChunkEncoder:
    """Encodes chunks, one after the other, with one tokenizer. Its cache is kept between chunks."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._encoder = create_encoder(job.engine, job.tokenizer)
        self._check = EngineCheck(job.engine, job.tokenizer)
        symbols = {"\0": "nul", "\u2581": "lower_blocks"}
        symbols |= dict.fromkeys(job.tokenizer.control_symbols, "control_symbols")
        self._unusual_symbols = {symbol.encode(): kind for symbol, kind in symbols.items()}

    def encode(self, chunk: Chunk, report: ProgressCallback) -> ShardRecord:
        """Encode a chunk, and write its shard.

        Args:
            chunk: The chunk to encode.
            report: The function that receives the progress after every batch and at the end of the chunk.

        Returns:
            The record of the shard.

        Raises:
            ChunkError: The chunk cannot be read, or the shard cannot be written.
        """
        warnings = InputWarnings(self._job.strict)
        self._check.start_shard()
        try:
            with _gc_disabled(), ShardWriter(self._job.folder, chunk.number) as shard:
                documents = _DocumentAssembler(shard, self._encoder, self._job.validation_fraction, warnings)
                for part in chunk.ranges:
                    fragments = read_fragments(part, self._job.text_key, warnings, self._job.folder)
                    if not self._encoder.is_word_local:
                        fragments = join_fragments(fragments)
                    for batch in _batches(fragments):
                        before = documents.totals()
                        self._encode_batch(batch, part.index, documents, warnings)
                        shard.flush()
                        new = [after - total for after, total in zip(documents.totals(), before, strict=True)]
                        report(new[0], new[1], new[2], 0)
                record = shard.finish(warnings)
                report(0, 0, 0, chunk.size)
                return record
        except OSError as error:
            raise ChunkError(chunk.number, write_error(error, self._job.folder)) from None
        except Exception as error:
            raise ChunkError(chunk.number, error) from error

    def _encode_batch(
        self, batch: list[TextFragment], file: int, documents: _DocumentAssembler, warnings: InputWarnings
    ) -> None:
        """Encode fragments of one file, and add them to the documents of the shard."""
        texts = [fragment.text for fragment in batch]
        try:
            raw_texts = list(map(str.encode, texts))
        except UnicodeEncodeError:
            for number, fragment in enumerate(batch):
                texts[number], count = replace_surrogates(fragment.text)
                warnings.add("lone_surrogates", InputLocation(file, fragment.line), count)
            raw_texts = list(map(str.encode, texts))
        joined = b"".join(raw_texts)
        for symbol, kind in self._unusual_symbols.items():
            # Symbols are rare, so the fragments are searched one by one only if the batch contains the symbol.
            if symbol in joined:
                for fragment, raw in zip(batch, raw_texts, strict=True):
                    warnings.add(kind, InputLocation(file, fragment.line), raw.count(symbol))
        encoded = self._encoder.encode(texts)
        self._check.compare(texts, (InputLocation(file, fragment.line) for fragment in batch), encoded)
        for fragment, raw, ids in zip(batch, raw_texts, encoded, strict=True):
            documents.add(fragment, file, raw, ids)


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection within the `with` block.

    Encoding creates no reference cycles, but the collector would repeatedly scan its long lists of words.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _DocumentAssembler:
    """Assembles encoded fragments into the documents of a shard."""

    def __init__(
        self, shard: ShardWriter, encoder: CachedEncoder, validation_fraction: float, warnings: InputWarnings
    ) -> None:
        self._shard, self._validation_fraction, self._warnings = shard, validation_fraction, warnings
        self._end_of_document, self._id_bytes = encoder.end, encoder.width
        self._reset()

    def _reset(self) -> None:
        """Start a new document."""
        self._hash = hashlib.md5(usedforsecurity=False)
        self._text_bytes = self._ids_bytes = 0
        self._is_blank = True

    def add(self, fragment: TextFragment, file: int, raw: bytes, ids: bytes) -> None:
        """Append a fragment to the current document.

        Args:
            fragment: The fragment.
            file: The index of the fragment's file.
            raw: The text of the fragment in UTF-8.
            ids: The token ids of the fragment, as the bytes of .bin.
        """
        self._hash.update(raw)
        self._text_bytes += len(raw)
        self._ids_bytes += len(ids)
        self._is_blank = self._is_blank and (not raw or fragment.text.isspace())
        self._shard.write(ids)
        if fragment.is_last:
            self._end_document(fragment, InputLocation(file, fragment.line))
            self._reset()

    def _end_document(self, last: TextFragment, location: InputLocation) -> None:
        if self._ids_bytes:
            self._shard.write(self._end_of_document)
            self._ids_bytes += self._id_bytes
        tokens = self._ids_bytes // self._id_bytes
        if self._is_blank:
            self._warnings.add("blank" if self._text_bytes else "empty", location)
        if tokens > MAX_SEQUENCE:
            self._warnings.add("long", location)
        digest = self._hash.digest()
        split_digest = text_digest(last.key) if last.key else digest
        validation = is_validation(split_digest, self._validation_fraction)
        self._shard.end_document(tokens, self._text_bytes, validation, digest)

    def totals(self) -> tuple[int, int, int]:
        """Return the number of documents, tokens and bytes of text so far.

        The tokens and bytes include those of the unfinished document.
        """
        tokens = self._shard.tokens + self._ids_bytes // self._id_bytes
        return self._shard.documents, tokens, self._shard.text_bytes + self._text_bytes


def _batches(fragments: Iterator[TextFragment]) -> Iterator[list[TextFragment]]:
    batch: list[TextFragment] = []
    characters = 0
    for fragment in fragments:
        batch.append(fragment)
        characters += len(fragment.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def write_error(error: OSError, folder: Path) -> MachineError:
    """Return the user-facing error for a failed write in `folder`."""
    do = "free space or choose another --output, then run the command again: it resumes where it stopped"
    return MachineError(f"cannot write: {error.strerror}", str(error.filename or folder), do)
