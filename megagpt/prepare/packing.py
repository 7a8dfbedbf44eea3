"""A packed copy of a corpus: documents fitted into samples whole, instead of being cut wherever a sample ends.

The longest first, each into the fullest sample that still has room for it, as in Ding et al. 2024 (arXiv 2404.10830).
A chunk is what is placed: a document, or of one longer than a sample its full samples and the rest.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import CorpusReader
from megagpt.data.indexed_writer import CorpusWriter
from megagpt.errors import MachineError
from megagpt.prepare.summary import Packing
from megagpt.prepare.workplace import mapped

_ENTRIES, _TOKENS = 1 << 16, 1 << 20  # documents or chunks looked at together, and tokens copied together, about
Numbers = npt.NDArray[np.int64]
_Held = tuple["_Held", int, int] | None  # what a sample held before, and then so many chunks of this length


class Mix(NamedTuple):
    """So many `samples` that hold chunks of the same lengths `[chunks]` (tokens), in this order."""

    samples: int
    lengths: Numbers


def best_fit(counts: Sequence[int]) -> list[Mix]:
    """How chunks fill samples. `counts[length]` are there of each length; the last length is the sample's.

    Chunks of one length are placed together, and so are samples that held the same: time and memory depend on the
    length of the samples, not on the number of chunks.
    """
    longest = len(counts) - 1
    rooms = [longest]  # that some samples have, ascending
    samples_of: dict[int, list[tuple[int, _Held]]] = {longest: [(sum(counts), None)]}  # by room; at first all are empty

    def put(room: int, samples: int, held: _Held) -> None:
        if samples and room not in samples_of:
            insort(rooms, room)
        if samples:
            samples_of.setdefault(room, []).append((samples, held))

    for length in range(longest, 0, -1):
        left = counts[length]
        while left:
            at = bisect_left(rooms, length)
            room = rooms[at]
            samples, held = samples_of[room].pop()
            if not samples_of[room]:
                del samples_of[room], rooms[at]
            # The fullest that has room stays the fullest until it has none: all that go in go in at once.
            each = room // length
            full = min(samples, left // each)
            rest = left - full * each if full < samples else 0
            put(room - each * length, full, (held, length, each))
            put(room - rest * length, 1 if rest else 0, (held, length, rest))
            put(room, samples - full - (rest > 0), held)
            left -= full * each + rest
    return [Mix(samples, _lengths(held)) for room in rooms for samples, held in samples_of[room] if held]


def _lengths(held: _Held) -> Numbers:
    lengths, times = [], []
    while held:
        held, length, count = held
        lengths.append(length)
        times.append(count)
    return np.repeat(lengths[::-1], times[::-1])


def pack(reader: CorpusReader, writer: CorpusWriter, seq_len: int, eod: int, folder: Path) -> Packing:
    """Write all tokens of a corpus, each once, as samples of `seq_len + 1` tokens, one sequence each.

    A sample that is not full is filled with `eod`: what follows the end of its last document. Samples are mixed in
    proportion, so that they take documents from about one place of the corpus at a time. Memory does not grow with the
    corpus; places of all chunks lie in a file in `folder` meanwhile.
    """
    size, path = seq_len + 1, folder / "places"
    documents, before, after, counts = _measured(reader, size)
    mixes = best_fit(counts.tolist())
    places = mapped(path, np.int64, int(counts.sum()))
    turns = _Turns(counts)
    for begins, lengths in _chunks(reader, size):
        places[turns.take(lengths)] = begins
    turns = _Turns(counts)
    for chosen in _in_proportion(mixes, size):
        lengths = np.concatenate([np.tile(mix.lengths, mix.samples) for mix in chosen])
        writer.write_ids(_filled(reader, chosen, lengths, places[turns.take(lengths)], size, eod))
        samples = sum(mix.samples for mix in chosen)
        writer.end_sequences(np.full(samples, size), np.arange(samples) + 1, 0)
    path.unlink()
    return Packing(seq_len, writer.documents, writer.tokens - len(reader.tokens), documents, before, after)


def _measured(reader: CorpusReader, size: int) -> tuple[int, float, int, Numbers]:
    """Documents, how many are cut without packing and with it (see `Packing`), and chunks by length `[size + 1]`."""
    documents, before, after, counts = 0, 0.0, 0, np.zeros(size + 1, np.int64)
    for tokens in (np.diff(bounds) for bounds in _bounds(reader)):
        documents += len(tokens)
        # Samples that are not packed overlap by one token: of the size - 1 places where one may begin, size + 1 - n
        # keep a document of n tokens whole.
        before += float(np.clip((tokens - 2) / (size - 1), 0, 1).sum())
        after += int((tokens > size).sum())
        counts[size] += (tokens // size).sum()
        counts += np.bincount(tokens % size, minlength=size + 1)
    counts[0] = 0
    return documents, before, after, counts


def _bounds(reader: CorpusReader) -> Iterator[Numbers]:
    """Where documents begin, in tokens, some at a time, and where the last of them ends."""
    documents = len(reader.documents) - 1
    for first in range(0, documents, _ENTRIES):
        yield reader.document_starts(np.arange(first, min(first + _ENTRIES, documents) + 1))


def _chunks(reader: CorpusReader, size: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Where chunks begin, and how long they are, in tokens, some at a time."""
    for bounds in _bounds(reader):
        counts = -(-np.diff(bounds) // size)
        ends = np.cumsum(counts)  # chunks up to the end of each document
        for first in range(0, int(ends[-1]), _ENTRIES):
            number = np.arange(first, min(first + _ENTRIES, int(ends[-1])))
            document = np.searchsorted(ends, number, side="right")
            begins = bounds[document] + (number - (ends - counts)[document]) * size
            yield begins, np.minimum(bounds[document + 1] - begins, size)


class _Turns:
    """Numbers chunks by their length, and those of one length as they come."""

    def __init__(self, counts: Numbers) -> None:
        self._next = np.cumsum(counts) - counts

    def take(self, lengths: Numbers) -> Numbers:
        """The numbers of the next chunks of these lengths."""
        counts = np.bincount(lengths, minlength=len(self._next))
        numbers = np.empty(len(lengths), np.int64)
        before = np.cumsum(counts) - counts
        numbers[np.argsort(lengths, kind="stable")] = np.repeat(self._next - before, counts) + np.arange(len(lengths))
        self._next += counts
        return numbers


def _in_proportion(mixes: Sequence[Mix], size: int) -> Iterator[list[Mix]]:
    """All samples in blocks of about a million tokens, each with about the same share of every mix."""
    samples = np.array([mix.samples for mix in mixes])
    blocks = -(-int(samples.sum()) * size // _TOKENS)
    shift = np.arange(len(mixes)) * blocks // max(len(mixes), 1)  # or all that are rare would come last
    done = np.zeros_like(samples)
    for block in range(1, blocks + 1):
        due = (samples * block + shift) // blocks
        yield [Mix(int((due - done)[n]), mixes[n].lengths) for n in np.flatnonzero(due > done).tolist()]
        done = due


def _filled(
    reader: CorpusReader, chosen: Sequence[Mix], lengths: Numbers, begins: Numbers, size: int, eod: int
) -> memoryview:
    """The ids of samples, of which chunks of these lengths `[chunks]` begin there in the corpus."""
    samples = sum(mix.samples for mix in chosen)
    chunks = np.concatenate([np.full(mix.samples, len(mix.lengths)) for mix in chosen])  # of each sample
    before = np.cumsum(lengths) - lengths
    shift = np.arange(samples) * size - before[np.cumsum(chunks) - chunks]
    ids = np.full(samples * size, eod, reader.dtype).data.cast("B")
    targets = before + np.repeat(shift, chunks)
    spans = np.stack([begins, targets, targets + lengths]) * reader.dtype.itemsize
    for begin, target, end in spans.T.tolist():
        if os.preadv(reader.fd, [ids[target:end]], begin) != end - target:
            do = "type the command again"
            raise MachineError("a file was cut short while it was read", f"{reader.prefix}.bin", do)
    return ids
