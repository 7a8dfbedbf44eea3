"""Packs the documents of a corpus into samples of fixed length, so that as few documents as possible are split.

The algorithm is best-fit-decreasing packing, as in Ding et al. 2024 (arXiv 2404.10830). Segments are placed from the
longest to the shortest, each in the fullest sample that still has room for it. A document that fits into a sample is a
single segment. A longer document is divided into segments of the length of a sample and one for the rest.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import MachineError
from megagpt.prepare.summary import PackingSummary
from megagpt.prepare.workdir import create_memmap

_ENTRIES = 1 << 16  # number of documents or segments processed together
_TOKENS = 1 << 20  # approximate number of tokens copied together
Integers = npt.NDArray[np.int64]
# Content of a sample as a linked list. Each node is the previous content, the length of the segments that were added
# last, and the number of these segments.
_Content = tuple["_Content", int, int] | None


class SampleGroup(NamedTuple):
    """Group of samples whose segments have the same lengths.

    Attributes:
        samples: The number of samples in the group.
        lengths: The lengths of the segments in each sample, in tokens and in order, `[segments]`.
    """

    samples: int
    lengths: Integers


def best_fit(counts: Sequence[int]) -> list[SampleGroup]:
    """Assign segments to samples by best-fit decreasing.

    Segments of the same length are placed in one step, and samples with the same content are handled as a group. Time
    and memory therefore depend on the length of the samples, not on the number of segments.

    Args:
        counts: The number of segments of each length, `[sample length + 1]`.

    Returns:
        All non-empty samples, grouped by their content.
    """
    longest = len(counts) - 1
    rooms = [longest]  # all amounts of free room that samples have, in tokens and in ascending order
    # For each amount of room, the groups of samples that have it, as the number of samples and their content. Initially
    # all samples are empty.
    samples_by_room: dict[int, list[tuple[int, _Content]]] = {longest: [(sum(counts), None)]}

    def put(room: int, samples: int, content: _Content) -> None:
        if not samples:
            return
        if room not in samples_by_room:
            insort(rooms, room)
        samples_by_room.setdefault(room, []).append((samples, content))

    for length in range(longest, 0, -1):
        remaining = counts[length]
        while remaining:
            index = bisect_left(rooms, length)
            room = rooms[index]
            samples, content = samples_by_room[room].pop()
            if not samples_by_room[room]:
                del samples_by_room[room], rooms[index]
            # The fullest sample with enough room remains the fullest until it has no room for another segment of this
            # length. It therefore receives as many of these segments as fit.
            fitting = room // length
            full = min(samples, remaining // fitting)  # number of samples that receive `fitting` segments
            rest = remaining - full * fitting if full < samples else 0  # number of segments for one more sample
            put(room - fitting * length, full, (content, length, fitting))
            if rest:
                put(room - rest * length, 1, (content, length, rest))
                put(room, samples - full - 1, content)
            else:
                put(room, samples - full, content)
            remaining -= full * fitting + rest
    return [
        SampleGroup(samples, _lengths(content))
        for room in rooms
        for samples, content in samples_by_room[room]
        if content
    ]


def _lengths(content: _Content) -> Integers:
    """Return the lengths of the segments of a sample, in the order in which they were placed."""
    lengths, counts = [], []
    while content:
        content, length, count = content
        lengths.append(length)
        counts.append(count)
    return np.repeat(lengths[::-1], counts[::-1])


def pack(reader: CorpusReader, writer: CorpusWriter, seq_len: int, eod: int, folder: Path) -> PackingSummary:
    """Pack a corpus into samples of `seq_len + 1` tokens. Each sample is written as one sequence.

    Every token of the corpus is written exactly once. Samples that are not full are padded with `eod`, which is also
    the last token of every document. The groups of samples are interleaved in proportion to their size, so that nearby
    samples contain documents from nearby positions of the corpus. Memory does not grow with the corpus.

    Args:
        reader: The corpus to pack.
        writer: The writer that receives the samples. The caller must finish it.
        seq_len: Tokens per sample, without the last label.
        eod: The id of the end-of-document symbol.
        folder: The folder for a temporary file with the positions of all segments.

    Returns:
        The number of samples, the number of padding tokens, and the number of documents that are split.
    """
    size, path = seq_len + 1, folder / "segments"
    documents, cut_before, cut_after, counts = _measure(reader, size)
    groups = best_fit(counts.tolist())
    # Offsets of all segments in the corpus, sorted by segment length. Segments of equal length are used in this order.
    begins_by_length = create_memmap(path, np.int64, int(counts.sum()))
    cursor = _SegmentCursor(counts)
    for begins, lengths in _segments(reader, size):
        begins_by_length[cursor.take(lengths)] = begins
    cursor = _SegmentCursor(counts)
    for batch in _interleave(groups, size):
        lengths = np.concatenate([np.tile(group.lengths, group.samples) for group in batch])
        begins = begins_by_length[cursor.take(lengths)]
        writer.write_ids(_fill_samples(reader, batch, lengths, begins, size, eod))
        samples = sum(group.samples for group in batch)
        writer.end_sequences(np.full(samples, size), np.arange(samples) + 1, 0)
    path.unlink()
    padding = writer.tokens - len(reader.tokens)
    return PackingSummary(seq_len, writer.documents, padding, documents, cut_before, cut_after)


def _measure(reader: CorpusReader, size: int) -> tuple[int, float, int, Integers]:
    """Count the documents and segments of a corpus.

    Returns:
        The number of documents, the expected number of documents split without packing, the number of documents split
        with packing, and the number of segments of each length `[size + 1]`.
    """
    documents, cut_before, cut_after, counts = 0, 0.0, 0, np.zeros(size + 1, np.int64)
    for bounds in _document_bounds(reader):
        tokens = np.diff(bounds)
        documents += len(tokens)
        # Without packing, samples overlap by one token and therefore begin at every (size - 1)-th token. With
        # size + 1 - n of the size - 1 possible offsets, a document of n tokens is not split.
        cut_before += float(np.clip((tokens - 2) / (size - 1), 0, 1).sum())
        cut_after += int((tokens > size).sum())
        counts[size] += (tokens // size).sum()
        counts += np.bincount(tokens % size, minlength=size + 1)
    counts[0] = 0
    return documents, cut_before, cut_after, counts


def _document_bounds(reader: CorpusReader) -> Iterator[Integers]:
    """Yield the token offsets at which documents begin, in batches.

    Each batch ends with one more offset, the end of its last document.
    """
    documents = len(reader.documents) - 1
    for first in range(0, documents, _ENTRIES):
        yield reader.document_starts(np.arange(first, min(first + _ENTRIES, documents) + 1))


def _segments(reader: CorpusReader, size: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield the offsets and lengths of all segments in tokens, in batches."""
    for bounds in _document_bounds(reader):
        counts = -(-np.diff(bounds) // size)  # number of segments per document
        ends = np.cumsum(counts)
        for first in range(0, int(ends[-1]), _ENTRIES):
            segment = np.arange(first, min(first + _ENTRIES, int(ends[-1])))
            document = np.searchsorted(ends, segment, side="right")
            begins = bounds[document] + (segment - (ends - counts)[document]) * size
            yield begins, np.minimum(bounds[document + 1] - begins, size)


class _SegmentCursor:
    """Numbers all segments by length. Segments of the same length are numbered in the order in which they are taken."""

    def __init__(self, counts: Integers) -> None:
        self._next = np.cumsum(counts) - counts  # number of the next segment of each length

    def take(self, lengths: Integers) -> Integers:
        """Return the number of the next segment of each given length."""
        counts = np.bincount(lengths, minlength=len(self._next))
        numbers = np.empty(len(lengths), np.int64)
        before = np.cumsum(counts) - counts
        numbers[np.argsort(lengths, kind="stable")] = np.repeat(self._next - before, counts) + np.arange(len(lengths))
        self._next += counts
        return numbers


def _interleave(groups: Sequence[SampleGroup], size: int) -> Iterator[list[SampleGroup]]:
    """Yield all samples in batches of about `_TOKENS` tokens.

    Each batch contains about the same fraction of every group of samples.
    """
    samples = np.array([group.samples for group in groups])
    batches = -(-int(samples.sum()) * size // _TOKENS)
    # Without this shift, all small groups would be in the last batches.
    shift = np.arange(len(groups)) * batches // max(len(groups), 1)
    done = np.zeros_like(samples)
    for batch in range(1, batches + 1):
        due = (samples * batch + shift) // batches
        yield [SampleGroup(int((due - done)[n]), groups[n].lengths) for n in np.flatnonzero(due > done).tolist()]
        done = due


def _fill_samples(
    reader: CorpusReader, batch: Sequence[SampleGroup], lengths: Integers, begins: Integers, size: int, eod: int
) -> memoryview:
    """Return the ids of a batch of samples.

    Args:
        reader: The corpus.
        batch: The samples.
        lengths: The lengths of the segments of all samples, in order, `[segments]`.
        begins: The token offsets in the corpus at which the segments begin, `[segments]`.
        size: Tokens per sample.
        eod: The id with which samples are padded.

    Returns:
        The ids `[samples * size]`, as the bytes of .bin.

    Raises:
        MachineError: The corpus was truncated while it was read.
    """
    samples = sum(group.samples for group in batch)
    # Number of segments in each sample.
    segments = np.concatenate([np.full(group.samples, len(group.lengths)) for group in batch])
    before = np.cumsum(lengths) - lengths
    shift = np.arange(samples) * size - before[np.cumsum(segments) - segments]
    ids = np.full(samples * size, eod, reader.dtype).data.cast("B")
    targets = before + np.repeat(shift, segments)
    ranges = np.stack([begins, targets, targets + lengths]) * reader.dtype.itemsize
    for begin, target, end in ranges.T.tolist():
        if os.preadv(reader.fd, [ids[target:end]], begin) != end - target:
            what = "a file was truncated while it was read"
            raise MachineError(what, f"{reader.prefix}.bin", "run the command again")
    return ids
