"""Samples the text on which a tokenizer is trained and measured.

The sample does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megagpt.prepare.chunks import Chunk, split_into_chunks
from megagpt.prepare.encode import ChunkError, ProgressCallback
from megagpt.prepare.input_warnings import InputWarnings
from megagpt.prepare.readers.documents import TextFragment, is_validation, text_digest
from megagpt.prepare.readers.inputs import InputFile
from megagpt.prepare.readers.reader import read_fragments
from megagpt.prepare.workers import ChunkTask, run_tasks
from megagpt.tokenizer.line_sample import BoundedSample
from megagpt.tokenizer.tokenizer import SAMPLE_BYTES, training_lines, without_surrogates

_MEASURED_BYTES = 1_000_000  # maximum bytes of text on which the quality of a tokenizer is measured
# Only the beginning of a document, up to this number of characters, is measured. It always fits into a sample, since a
# character has at most 4 bytes.
_HEAD = _MEASURED_BYTES // 4


@dataclass
class TokenizerSample:
    """Text on which a tokenizer is trained and measured.

    Attributes:
        lines: The lines to train on, sampled from the training part.
        seen: The documents of the training part to measure on.
        unseen: The documents of the validation part to measure on.
        documents: The number of documents in the training part.
        text_bytes: The size of the training part in bytes of UTF-8.
    """

    lines: BoundedSample = field(default_factory=lambda: BoundedSample(SAMPLE_BYTES))
    seen: BoundedSample = field(default_factory=lambda: BoundedSample(_MEASURED_BYTES))
    unseen: BoundedSample = field(default_factory=lambda: BoundedSample(_MEASURED_BYTES))
    documents: int = 0
    text_bytes: int = 0

    def merge(self, other: TokenizerSample) -> None:
        """Merge the sample of other chunks into this sample."""
        self.lines.merge(other.lines)
        self.seen.merge(other.seen)
        self.unseen.merge(other.unseen)
        self.documents += other.documents
        self.text_bytes += other.text_bytes

    def thresholds(self) -> tuple[int, int, int]:
        """Return the thresholds of the three samples. Texts with larger numbers need not be sent by other processes."""
        return self.lines.threshold, self.seen.threshold, self.unseen.threshold


def sample_inputs(
    files: Sequence[InputFile], key: tuple[str, ...], validation_fraction: float, workers: int
) -> TokenizerSample:
    """Sample the documents of the input. Memory does not grow with the input.

    Args:
        files: The files of the input.
        key: The keys that lead to the text in a JSON line or table row, outermost first.
        validation_fraction: The fraction of the documents that are assigned to the validation part.
        workers: The maximum number of processes.

    Returns:
        The sample of the whole input.

    Raises:
        UserError: The input cannot be read.
    """
    chunks = split_into_chunks(files)
    sample = TokenizerSample()
    tasks = (ChunkTask(chunk, sample.thresholds()) for chunk in chunks)
    create = partial(_create_sampler, key, validation_fraction)
    try:
        for chunk_sample in run_tasks(create, tasks, min(workers, len(chunks)), lambda *_: None):
            sample.merge(chunk_sample)
    except ChunkError as failure:
        raise failure.cause from None
    return sample


def _create_sampler(
    key: tuple[str, ...], validation_fraction: float
) -> Callable[[ChunkTask, ProgressCallback], TokenizerSample]:
    def sample(task: ChunkTask, report: ProgressCallback) -> TokenizerSample:
        try:
            return _sample_chunk(task.chunk, task.argument, key, validation_fraction)
        except Exception as error:
            raise ChunkError(task.chunk.number, error) from error

    return sample


def _sample_chunk(
    chunk: Chunk, thresholds: tuple[int, int, int], key: tuple[str, ...], validation_fraction: float
) -> TokenizerSample:
    lines, seen, unseen = thresholds
    sample = TokenizerSample(
        BoundedSample(SAMPLE_BYTES, lines), BoundedSample(_MEASURED_BYTES, seen), BoundedSample(_MEASURED_BYTES, unseen)
    )
    document = _DocumentSampler(sample, validation_fraction, chunk.number)
    for part in chunk.ranges:
        for fragment in read_fragments(part, key, InputWarnings()):
            document.add(fragment)
    return sample


class _DocumentSampler:
    """Adds documents to a sample.

    The lines of a document are added to the sample only at the end of the document. Only then is its hash known, which
    decides whether it belongs to the training part.
    """

    def __init__(self, sample: TokenizerSample, validation_fraction: float, chunk: int) -> None:
        self._sample, self._validation_fraction, self._chunk = sample, validation_fraction, chunk
        self._document = self._line = 0
        self._reset()

    def add(self, fragment: TextFragment) -> None:
        """Add a fragment to the current document."""
        text = without_surrogates(fragment.text)
        raw = text.encode()
        self._hash.update(raw)
        self._bytes += len(raw)
        self._head += text[: _HEAD - len(self._head)]
        for line in training_lines(text):
            self._lines.add((self._chunk, self._line), line)
            self._line += 1
        if fragment.is_last:
            self._end_document(fragment.key)
            self._reset()

    def _reset(self) -> None:
        """Start a new document."""
        self._hash = hashlib.md5(usedforsecurity=False)
        self._head, self._bytes = "", 0
        self._lines = BoundedSample(self._sample.lines.limit, self._sample.lines.threshold)

    def _end_document(self, key: str) -> None:
        digest = text_digest(key) if key else self._hash.digest()
        held_out = is_validation(digest, self._validation_fraction)
        measured = self._sample.unseen if held_out else self._sample.seen
        measured.add((self._chunk, self._document), self._head)
        self._document += 1
        if not held_out:
            self._sample.lines.merge(self._lines)
            self._sample.documents += 1
            self._sample.text_bytes += self._bytes
