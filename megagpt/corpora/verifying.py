"""All of a corpus read and checked: the index against itself, the ids, and both files against the sidecar."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megagpt.data.checksums import combine_crc32
from megagpt.data.indexed import CorpusReader, corpus_file
from megagpt.data.sidecar import Sidecar
from megagpt.files import crc32

_STRETCH, _BLOCK = 1 << 26, 1 << 22  # bytes that one thread takes, and reads at a time
_ENTRIES = 1 << 20  # of the index, looked at together


@dataclass(frozen=True)
class Verification:
    """What was read and what is wrong. `checked` says against what the files could be held."""

    prefix: str
    documents: int
    tokens: int
    checked: tuple[str, ...]
    wrong: tuple[str, ...]
    packed: int | None = None

    def __str__(self) -> str:
        kind = "samples" if self.packed else "documents"
        head = f"{self.prefix}: {self.documents:,} {kind}, {self.tokens:,} tokens"
        checked = "checked: " + ", ".join(self.checked)
        return "\n".join([head, checked, *(f"WRONG: {one}" for one in self.wrong)] + ([] if self.wrong else ["whole"]))


@dataclass(frozen=True)
class _Read:
    """A stretch of .bin: where it is, its checksum, and its smallest and largest id."""

    start: int
    size: int
    crc32: int
    least: int
    most: int


def verify(prefix: str, workers: int | None = None) -> Verification:
    """Read all of a corpus with so many threads (None: as many as there are cores) and say what is wrong with it.

    Raises UserError where the files cannot be opened as a corpus at all.
    """
    reader = CorpusReader(prefix)
    facts = reader.sidecar
    wrong = list(_index(reader))
    cuts = _cuts(reader)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        stretches = list(pool.map(lambda cut: _read(reader, *cut), cuts))
    least, most = min((s.least for s in stretches), default=0), max((s.most for s in stretches), default=0)
    checked = ["index", f"ids {least:,} to {most:,}"]
    if least < 0:
        wrong.append(f"there is an id below 0: {least}")
    if facts:
        checked += ["checksums", f"vocabulary of {facts.vocab_size:,}"]
        checked += [f"samples of {facts.packed + 1:,} tokens" if facts.packed else "ends of documents"]
        if most >= facts.vocab_size:
            wrong.append(f"there is an id beyond the vocabulary of {facts.vocab_size:,}: {most:,}")
        wrong += _checksums(reader, stretches)
        wrong += _samples(reader, facts) if facts.packed else _ends(reader, facts.eod)
    documents, tokens = len(reader.documents) - 1, len(reader.tokens)
    return Verification(prefix, documents, tokens, tuple(checked), tuple(wrong), reader.packed)


def _cuts(reader: CorpusReader) -> list[tuple[int, int]]:
    """Where stretches of .bin begin, in bytes, and how long they are: the sidecar's, if it has them."""
    size = len(reader.tokens) * reader.dtype.itemsize
    stretches = reader.sidecar.bin_ranges if reader.sidecar else ()
    lengths = [length for length, _ in stretches]
    if sum(lengths) != size:
        lengths = [min(_STRETCH, size - start) for start in range(0, size, _STRETCH)]
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    return list(zip(starts, lengths, strict=True))


def _read(reader: CorpusReader, start: int, size: int) -> _Read:
    width, checksum, least, most = reader.dtype.itemsize, 0, 0, 0
    for at in range(start, start + size, _BLOCK):
        block = reader.read_range(at // width, min(_BLOCK, start + size - at) // width)
        checksum = zlib.crc32(block, checksum)
        ids = np.frombuffer(block, reader.dtype)
        least, most = min(least, int(ids.min())), max(most, int(ids.max()))
    return _Read(start, size, checksum, least, most)


def _index(reader: CorpusReader) -> Iterator[str]:
    """What is wrong within the index."""
    offset, width = 0, reader.dtype.itemsize
    for at in range(0, len(reader), _ENTRIES):
        lengths = reader.lengths[at : at + _ENTRIES].astype(np.int64)
        ends = offset + np.cumsum(lengths) * width
        if lengths.min() < 0:
            yield f"sequence {at + int(np.argmin(lengths)):,} has a length below 0"
            return
        apart = np.flatnonzero(reader.offsets[at : at + _ENTRIES] != ends - lengths * width)
        if apart.size:
            yield f"sequence {at + int(apart[0]):,} does not begin where the one before ends"
            return
        offset = int(ends[-1])
    if reader.documents[0] != 0:
        yield "the first document does not begin with the first sequence"
    for at in range(0, len(reader.documents) - 1, _ENTRIES):
        back = np.flatnonzero(np.diff(reader.documents[at : at + _ENTRIES + 1]) < 0)
        if back.size:
            yield f"document {at + int(back[0]):,} ends before it begins"
            return


def _checksums(reader: CorpusReader, stretches: list[_Read]) -> Iterator[str]:
    facts = reader.sidecar
    assert facts is not None
    whole = 0
    for one in stretches:
        whole = combine_crc32(whole, one.crc32, one.size)
    if whole != facts.bin_crc32:
        damaged = [one for one, (_, good) in zip(stretches, facts.bin_ranges, strict=False) if one.crc32 != good]
        where = ", ".join(f"bytes {one.start:,} to {one.start + one.size:,}" for one in damaged)
        yield f"{reader.prefix}.bin is not what was written" + (f": {where}" if where else "")
    if crc32(corpus_file(reader.prefix, ".idx")) != facts.idx_crc32:
        yield f"{reader.prefix}.idx is not what was written"


def _samples(reader: CorpusReader, facts: Sidecar) -> Iterator[str]:
    """What is wrong with packed samples: their lengths, how they end, and how much of them is padding."""
    size, padding = (facts.packed or 0) + 1, 0
    step = max(1, _ENTRIES // size)
    for at in range(0, len(reader), step):
        other = np.flatnonzero(reader.lengths[at : at + step] != size)
        if other.size:
            yield f"sample {at + int(other[0]):,} has not {size:,} tokens"
            return
        count = min(step, len(reader) - at)
        ends = np.frombuffer(reader.read_range(at * size, count * size), reader.dtype).reshape(count, size) == facts.eod
        torn = np.flatnonzero(~ends[:, -1] & ends.any(axis=1))
        if torn.size:
            yield f"sample {at + int(torn[0]):,} holds the end of a document, and ends within another"
            return
        padding += int((ends[:, 1:] & ends[:, :-1]).sum())
    if padding < facts.padding:
        yield f"at most {padding:,} tokens are padding, the sidecar speaks of {facts.padding:,}"


def _ends(reader: CorpusReader, eod: int) -> Iterator[str]:
    """A document that does not end with the end-of-document symbol, the first one, if any."""
    for at in range(0, len(reader.documents) - 1, _ENTRIES):
        bounds = reader.documents[at : at + _ENTRIES + 1]
        full = np.flatnonzero(np.diff(bounds) > 0)
        last = bounds[full + 1] - 1  # sequence
        ends = reader.offsets[last] // reader.dtype.itemsize + reader.lengths[last] - 1
        other = np.flatnonzero((reader.tokens[ends] != eod) & (reader.lengths[last] > 0))
        if other.size:
            yield f"document {at + int(full[other[0]]):,} does not end with the end-of-document symbol ({eod})"
            return
