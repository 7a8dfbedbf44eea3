"""The command `megagpt data verify`, which reads a whole corpus and checks it for damage.

It checks the index, the ids and, if the corpus has a sidecar, the checksums of both files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megagpt.corpus.crc32 import combine_crc32
from megagpt.corpus.metadata import Sidecar
from megagpt.corpus.reader import CorpusReader, corpus_file
from megagpt.files import crc32

_RANGE = 1 << 26  # number of bytes of .bin that a thread checks as one task, if the sidecar records no ranges
_BLOCK = 1 << 22  # number of bytes read at a time
_ENTRIES = 1 << 20  # number of index entries checked per batch


@dataclass(frozen=True)
class Verification:
    """Result of verifying a corpus.

    Attributes:
        prefix: prefix of the corpus.
        documents: number of documents.
        tokens: number of tokens.
        checked: list of the checks that were made. Some checks need a sidecar.
        wrong: list of the problems that were found.
        packed: seq_len of a packed corpus, or None if the corpus is not packed.
    """

    prefix: str
    documents: int
    tokens: int
    checked: tuple[str, ...]
    wrong: tuple[str, ...]
    packed: int | None = None

    def __str__(self) -> str:
        kind = "samples" if self.packed else "documents"
        lines = [
            f"{self.prefix}: {self.documents:,} {kind}, {self.tokens:,} tokens",
            "checked: " + ", ".join(self.checked),
            *(f"DAMAGED: {problem}" for problem in self.wrong),
        ]
        if not self.wrong:
            lines.append("no damage found")
        return "\n".join(lines)


@dataclass(frozen=True)
class _BinRange:
    """Range of .bin that was read.

    Attributes:
        start: byte offset of the range.
        size: length of the range in bytes.
        crc32: CRC-32 of the range.
        min_id: smallest id in the range, or 0 if no id is negative.
        max_id: largest id in the range, at least 0.
    """

    start: int
    size: int
    crc32: int
    min_id: int
    max_id: int


def verify(prefix: str, workers: int | None = None) -> Verification:
    """Read a whole corpus and check it for damage.

    Args:
        prefix: prefix of the corpus.
        workers: number of threads. If None, one thread per available core is used.

    Returns:
        The checks that were made, and the problems that were found.

    Raises:
        UserError: the files cannot be opened as a corpus.
    """
    reader = CorpusReader(prefix)
    sidecar = reader.sidecar
    wrong = list(_index_problems(reader))
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        ranges = list(pool.map(lambda bounds: _read_range(reader, *bounds), _range_bounds(reader)))
    min_id = min((part.min_id for part in ranges), default=0)
    max_id = max((part.max_id for part in ranges), default=0)
    checked = ["index", f"ids {min_id:,} to {max_id:,}"]
    if min_id < 0:
        wrong.append(f"there is a negative id: {min_id}")
    if sidecar:
        checked += ["checksums", f"vocabulary of {sidecar.vocab_size:,}"]
        if max_id >= sidecar.vocab_size:
            wrong.append(f"there is an id outside the vocabulary of {sidecar.vocab_size:,}: {max_id:,}")
        wrong += _checksum_problems(reader, sidecar, ranges)
        if sidecar.packed:
            checked.append(f"samples of {sidecar.packed + 1:,} tokens")
            wrong += _sample_problems(reader, sidecar, sidecar.packed + 1)
        else:
            checked.append("ends of documents")
            wrong += _document_end_problems(reader, sidecar.eod)
    documents, tokens = len(reader.documents) - 1, len(reader.tokens)
    return Verification(prefix, documents, tokens, tuple(checked), tuple(wrong), reader.packed)


def _range_bounds(reader: CorpusReader) -> list[tuple[int, int]]:
    """Divide .bin into ranges, and return the byte offset and length of each.

    The ranges are those of the sidecar if it records ranges that cover the whole file.
    """
    total = len(reader.tokens) * reader.dtype.itemsize
    recorded = reader.sidecar.bin_ranges if reader.sidecar else ()
    sizes = [size for size, _ in recorded]
    if sum(sizes) != total:
        sizes = [min(_RANGE, total - start) for start in range(0, total, _RANGE)]
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    return list(zip(starts, sizes, strict=True))


def _read_range(reader: CorpusReader, start: int, size: int) -> _BinRange:
    width = reader.dtype.itemsize
    checksum, min_id, max_id = 0, 0, 0
    for offset in range(start, start + size, _BLOCK):
        block = reader.read_range(offset // width, min(_BLOCK, start + size - offset) // width)
        checksum = zlib.crc32(block, checksum)
        ids = np.frombuffer(block, reader.dtype)
        min_id = min(min_id, int(ids.min()))
        max_id = max(max_id, int(ids.max()))
    return _BinRange(start, size, checksum, min_id, max_id)


def _index_problems(reader: CorpusReader) -> Iterator[str]:
    """Yield the problems in the index."""
    offset, width = 0, reader.dtype.itemsize
    for start in range(0, len(reader), _ENTRIES):
        lengths = reader.lengths[start : start + _ENTRIES].astype(np.int64)
        ends = offset + np.cumsum(lengths) * width
        if lengths.min() < 0:
            yield f"sequence {start + int(np.argmin(lengths)):,} has a negative length"
            return
        misplaced = np.flatnonzero(reader.offsets[start : start + _ENTRIES] != ends - lengths * width)
        if misplaced.size:
            yield f"sequence {start + int(misplaced[0]):,} does not start where the one before ends"
            return
        offset = int(ends[-1])
    if reader.documents[0] != 0:
        yield "the first document does not start with the first sequence"
    for start in range(0, len(reader.documents) - 1, _ENTRIES):
        backward = np.flatnonzero(np.diff(reader.documents[start : start + _ENTRIES + 1]) < 0)
        if backward.size:
            yield f"document {start + int(backward[0]):,} ends before it starts"
            return


def _checksum_problems(reader: CorpusReader, sidecar: Sidecar, ranges: list[_BinRange]) -> Iterator[str]:
    """Yield a problem for each file that does not match its checksum. For .bin, it names the damaged bytes."""
    checksum = 0
    for part in ranges:
        checksum = combine_crc32(checksum, part.crc32, part.size)
    if checksum != sidecar.bin_crc32:
        damaged = [
            f"bytes {part.start:,} to {part.start + part.size:,}"
            for part, (_, recorded) in zip(ranges, sidecar.bin_ranges, strict=False)
            if part.crc32 != recorded
        ]
        where = ": " + ", ".join(damaged) if damaged else ""
        yield f"{reader.prefix}.bin does not match its checksum{where}"
    if crc32(corpus_file(reader.prefix, ".idx")) != sidecar.idx_crc32:
        yield f"{reader.prefix}.idx does not match its checksum"


def _sample_problems(reader: CorpusReader, sidecar: Sidecar, size: int) -> Iterator[str]:
    """Yield the problems of packed samples of `size` tokens: wrong lengths, missing document ends, missing padding."""
    padding = 0
    step = max(1, _ENTRIES // size)
    for start in range(0, len(reader), step):
        wrong_size = np.flatnonzero(reader.lengths[start : start + step] != size)
        if wrong_size.size:
            yield f"sample {start + int(wrong_size[0]):,} does not have {size:,} tokens"
            return
        count = min(step, len(reader) - start)
        ids = np.frombuffer(reader.read_range(start * size, count * size), reader.dtype).reshape(count, size)
        ends = ids == sidecar.eod
        torn = np.flatnonzero(~ends[:, -1] & ends.any(axis=1))
        if torn.size:
            yield f"sample {start + int(torn[0]):,} holds the end of a document, but its last document has no end"
            return
        padding += int((ends[:, 1:] & ends[:, :-1]).sum())
    if padding < sidecar.padding:
        yield f"at most {padding:,} tokens are padding, but the sidecar records {sidecar.padding:,}"


def _document_end_problems(reader: CorpusReader, eod: int) -> Iterator[str]:
    """Yield a problem for the first document that does not end with the end-of-document token, if there is one."""
    for start in range(0, len(reader.documents) - 1, _ENTRIES):
        boundaries = reader.documents[start : start + _ENTRIES + 1]
        with_sequences = np.flatnonzero(np.diff(boundaries) > 0)
        last_sequence = boundaries[with_sequences + 1] - 1
        lengths = reader.lengths[last_sequence]
        last_token = reader.offsets[last_sequence] // reader.dtype.itemsize + lengths - 1
        unended = np.flatnonzero((reader.tokens[last_token] != eod) & (lengths > 0))
        if unended.size:
            document = start + int(with_sequences[unended[0]])
            yield f"document {document:,} does not end with the end-of-document token ({eod})"
            return
