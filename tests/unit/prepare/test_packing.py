"""Packing against a best fit that places one segment at a time; every token of every document is found again."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.prepare import pack as packing
from megagpt.prepare.pack import _interleave, best_fit, pack

EOD = 1
LENGTHS = st.integers(1, 24).flatmap(
    lambda longest: st.tuples(st.just(longest), st.lists(st.integers(1, longest), max_size=80))
)


def counted(longest, lengths):
    return np.bincount(lengths, minlength=longest + 1).tolist() if lengths else [0] * (longest + 1)


def one_by_one(longest, lengths):
    """Return the room left in each sample by a best fit of one segment after the other, the longest first."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else longest) - length)
    return rooms


def fewest(longest, lengths):
    """Return the smallest number of samples that can hold all segments, by exhaustive search."""

    def least(rest, rooms):
        if not rest:
            return len(rooms)
        best = least(rest[1:], (*rooms, longest - rest[0]))
        for index in {room: n for n, room in enumerate(rooms) if room >= rest[0]}.values():
            best = min(best, least(rest[1:], (*rooms[:index], rooms[index] - rest[0], *rooms[index + 1 :])))
        return best

    return least(sorted(lengths, reverse=True), ())


@given(example_=LENGTHS)
@example(example_=(7, [1] * 20))
@example(example_=(5, []))
@settings(max_examples=300, deadline=None)
def test_samples_are_those_of_a_best_fit_one_by_one(example_):
    longest, lengths = example_
    groups = best_fit(counted(longest, lengths))
    placed = Counter()
    for samples, held in groups:
        for length in held.tolist():
            placed[length] += samples
    assert placed == Counter(lengths)
    rooms = [longest - int(held.sum()) for samples, held in groups for _ in range(samples)]
    assert Counter(rooms) == Counter(one_by_one(longest, lengths))


@given(lengths=st.lists(st.integers(1, 12), max_size=7))
@settings(max_examples=100, deadline=None)
def test_the_number_of_samples_is_within_the_bound_of_best_fit(lengths):
    """At most 11/9 of the smallest number plus 6/9 (Dósa 2007)."""
    samples = sum(group.samples for group in best_fit(counted(12, lengths)))
    assert samples <= (11 * fewest(12, lengths) + 6) / 9


@pytest.mark.parametrize("longest", [9, 300])
def test_samples_and_segments_are_processed_in_batches(monkeypatch, tmp_path, longest):
    """For all lengths, including a document of many samples, and groups of one sample each."""
    monkeypatch.setattr(packing, "_ENTRIES", 50)
    monkeypatch.setattr(packing, "_TOKENS", 20 * longest)
    groups = best_fit([0, *np.random.default_rng(4).integers(0, 9, longest).tolist()])
    blocks = list(_interleave(groups, longest))
    assert max(sum(group.samples for group in block) for block in blocks) <= 60
    copied = Counter()
    for samples, lengths in (group for block in blocks for group in block):
        copied[tuple(lengths.tolist())] += samples
    expected = Counter()
    for samples, lengths in groups:
        expected[tuple(lengths.tolist())] += samples
    assert copied == expected
    reader = write(tmp_path / "c", documents_of([20_000, 3, 5] + [2] * 120), 30_000)
    assert max(len(begins) for begins, _ in packing._segments(reader, 10)) == 50


def test_the_groups_do_not_grow_with_the_number_of_segments():
    counts = [0, *np.random.default_rng(3).integers(0, 1000, 300).tolist()]
    few, many = best_fit(counts), best_fit([10**9 * count for count in counts])
    assert sum(group.samples * len(group.lengths) for group in many) == 10**9 * sum(counts)
    assert len(many) <= 1.2 * len(few) + 10


def write(prefix, documents, vocab_size=60_000):
    with CorpusWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids, 3 * len(ids))
        writer.finish("0" * 64, EOD)
    return CorpusReader(prefix)


def packed(reader, seq_len, folder):
    with CorpusWriter(folder / "packed", 60_000, reader.dtype) as writer:
        summary = pack(reader, writer, seq_len, EOD, folder)
        writer.finish("0" * 64, EOD, None, seq_len, summary.padding)
    return CorpusReader(folder / "packed"), summary


def segments_of(ids):
    """Return the segments of more than one token in a sample, split after each end of a document."""
    splits = [0, *(index + 1 for index, token in enumerate(ids) if token == EOD), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(splits) if b - a > 1]


def documents_of(lengths):
    """Return documents of these lengths, in which no token but the end occurs twice."""
    numbers = itertools.count(2)
    return [[*itertools.islice(numbers, length - 1), EOD] if length else [] for length in lengths]


@pytest.mark.parametrize("blocks", [(3, 64), (1 << 16, 1 << 20)])
@given(seq_len=st.integers(1, 20), lengths=st.lists(st.integers(0, 70), max_size=60))
@example(seq_len=8, lengths=[9] * 4 + [10, 18, 19, 27, 1, 0, 2])
@example(seq_len=8, lengths=[0, 0])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_occurs_once_and_no_document_that_fits_is_split(
    tmp_path_factory, monkeypatch, blocks, seq_len, lengths
):
    for name, size in zip(("_ENTRIES", "_TOKENS"), blocks, strict=True):
        monkeypatch.setattr(packing, name, size)
    folder, size = tmp_path_factory.mktemp("p"), seq_len + 1
    documents = documents_of(lengths)
    corpus, summary = packed(write(folder / "c", documents), seq_len, folder)
    samples = [corpus.sequence(number) for number in range(len(corpus))]
    assert all(len(sample) == size for sample in samples)
    assert corpus.documents.tolist() == list(range(len(samples) + 1))
    segments = [document[at : at + size] for document in documents for at in range(0, len(document), size)]
    found = [segment for sample in samples for segment in segments_of(sample.tolist())]
    assert sorted(found) == sorted(segment for segment in segments if len(segment) > 1)
    assert corpus.tokens.tolist().count(EOD) == sum(segment[-1] == EOD for segment in segments) + summary.padding
    assert summary.padding == len(samples) * size - sum(lengths)
    assert (summary.documents, summary.cut_after) == (len(lengths), sum(length > size for length in lengths))
    assert len(samples) == len(one_by_one(size, [len(segment) for segment in segments]))
