"""Loads the training batches of one data-parallel rank directly from the corpora when they are needed."""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megagpt.corpus.metadata import check_same_tokenizer
from megagpt.corpus.reader import CorpusReader, corpus_file
from megagpt.data.sampler import Sampler, rank_positions
from megagpt.data.skips import SkippedRanges
from megagpt.errors import UserError
from megagpt.state import IGNORE_INDEX

# Number of samples that are located at a time, which takes hardly more time than locating a few samples.
_LOCATED_SAMPLES = 4096
_CACHE_PROBES = 64  # number of located samples that are tested for being in the page cache
_CHECKED_DOCUMENTS = 64  # number of documents whose last token is compared with the end-of-document token
_CHECKED_LENGTHS = 1024  # number of sequences whose lengths are compared to recognize packed corpora
_Reads = tuple[list[int], list[int], list[int]]  # arguments of os.pread: file descriptors, sizes in bytes, and offsets


class Batch(NamedTuple):
    """Micro-batch of `input_ids` and `labels` (already shifted), both int64 `[micro_batch, seq_len]`."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Loader:
    """Loads the micro-batches of one data-parallel rank for the update at any data position.

    Args:
        sources: pairs of a corpus prefix and a weight. Weights are relative numbers of samples, or with `by_epochs`
            relative numbers of epochs.
        seq_len: tokens per sample, without the last label.
        seed: seed of the data order.
        vocab_size: number of ids in the model's vocabulary.
        micro_batch: samples per micro-batch.
        accumulation: micro-batches per update and rank.
        rank: data-parallel rank.
        data_parallel: number of data-parallel ranks.
        tokenizer: path of the model's tokenizer, which must be that of the corpora. If None, it is not checked.
        by_epochs: whether weights are relative numbers of epochs instead of samples.
        skip: ranges of data positions that are not trained on, as pairs (first, last) with both ends included.
        pinned: whether batches are in pinned memory, from which a GPU can copy while it computes.

    Attributes:
        sampler: sampler that maps data positions to samples.
        notes: messages for the user, for example about unverified corpora.
        fingerprint: JSON-compatible description of the data and its order, which is compared when a run is resumed.

    Raises:
        UserError: a corpus is missing, damaged or too short, was made with another tokenizer, is packed for another
            seq_len, or holds ids outside the model's vocabulary.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | os.PathLike[str], float]],
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        data_parallel: int = 1,
        tokenizer: str | None = None,
        by_epochs: bool = False,
        skip: Sequence[tuple[int, int]] = (),
        pinned: bool = False,
    ) -> None:
        self._readers = [CorpusReader(prefix) for prefix, _ in sources]
        probes = [check_vocabulary(reader, vocab_size, tokenizer) for reader in self._readers]
        weights = [
            weight * len(reader.tokens) if by_epochs else weight
            for (_, weight), reader in zip(sources, self._readers, strict=True)
        ]
        for reader in self._readers:
            _check_packed(reader, seq_len)
            if len(reader.tokens) <= seq_len:
                what = f"the corpus has {len(reader.tokens):,} tokens, fewer than one sample ({seq_len + 1:,})"
                raise UserError(what, reader.prefix, "prepare more text, or lower model.seq_len")
        packed = [index for index, reader in enumerate(self._readers) if reader.packed]
        self.sampler = Sampler([len(reader.tokens) for reader in self._readers], weights, seq_len, seed, packed)
        self.notes = tuple(note for reader in self._readers if (note := _unverified_note(reader)))
        self.fingerprint: dict[str, Any] = {
            "seq_len": seq_len,
            "seed": seed,
            "sources": [_identity(*source) for source in zip(self._readers, weights, probes, strict=True)],
        }
        self._next_to_check = itertools.cycle(self._readers)
        self._fds_and_widths = np.array([(reader.fd, reader.dtype.itemsize) for reader in self._readers]).T
        self._reader_by_fd = {reader.fd: reader for reader in self._readers}
        self._padding_by_fd = {r.fd: r.sidecar.eod for r in self._readers if r.sidecar and r.packed}
        self._dtypes = list({reader.dtype for reader in self._readers})
        self._skipped = SkippedRanges(skip)
        self._pinned = pinned
        self._rank, self._data_parallel = rank, data_parallel
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._samples = micro_batch * accumulation  # number of samples per update and rank
        self._global_batch = data_parallel * self._samples
        self._plan_updates(0)

    def refuse_validation_on(self, corpus: CorpusReader) -> None:
        """Raise UserError if a validation corpus is one of the training corpora, whatever the spelling of its path."""
        for reader in self._readers:
            if _is_same_content(reader, corpus):
                where = f"data.train       {reader.prefix}\ndata.validation  {corpus.prefix}"
                do = "give data.validation a corpus of its own, such as PREFIX.validation of `megagpt prepare`"
                raise UserError("the validation corpus is also trained on: their contents are the same", where, do)

    def batches(self, position: int) -> list[Batch]:
        """Load the micro-batches `[accumulation]` of the update that starts at this data position.

        The samples of the following update are prefetched from the disk, unless they seem to be in the page cache.

        Raises CorpusChanged if a corpus has changed since it was opened. Truncation is detected when a missing sample
        is read. Other changes are detected by checking one corpus per update, in turn.
        """
        next(self._next_to_check).check_unchanged()
        start = self._skipped.kept_index(position)
        reads = self._reads_of_update(start)
        samples = self._read(reads)
        if not self._in_page_cache:
            for fd, size, offset in zip(*self._reads_of_update(start + self._global_batch), strict=True):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        if not self._padding_by_fd:
            return [self._batch(micro, micro[:, 1:]) for micro in samples]
        padding = np.array([self._padding_by_fd.get(fd, IGNORE_INDEX) for fd in reads[0]])
        padding = padding.reshape(self._accumulation, self._micro_batch, 1)
        return [self._batch(micro, _packed_labels(micro, ids)) for micro, ids in zip(samples, padding, strict=True)]

    def document_end(self, given: int | None) -> int:
        """Return the token id that ends each document.

        Args:
            given: `data.eod` of the recipe. If None, the id is taken from the sidecars of the corpora.

        Raises:
            UserError: the id is unknown, the corpora and `given` specify different ids, or documents end with another
                token.
        """
        origins: dict[int, str] = {} if given is None else {given: "data.eod"}
        for reader in self._readers:
            if reader.sidecar:
                origins.setdefault(reader.sidecar.eod, reader.prefix)
        if not origins:
            what = "no corpus defines the token that ends a document"
            raise UserError(what, "data.document_mask", "set data.eod")
        if len(origins) > 1:
            what = "the corpora disagree about the token that ends a document"
            where = "\n".join(f"{end}  {origin}" for end, origin in origins.items())
            raise UserError(what, where, "prepare the corpora with one tokenizer")
        (end,) = origins
        for reader in self._readers:
            if reader.fd not in self._padding_by_fd:  # a split document ends in a later sample
                _check_document_ends(reader, end)
        return end

    def positions_used(self, position: int) -> int:
        """Return the number of data positions that the update at `position` uses, including skipped positions."""
        last = self._skipped.kept_index(position) + self._global_batch - 1
        return int(self._skipped.to_positions(np.array([last]))[0]) + 1 - position

    def _reads_of_update(self, start: int) -> _Reads:
        """Return the locations of this rank's samples for the update that starts at the kept index `start`."""
        if start not in self._planned:
            self._plan_updates(start)
        return self._planned[start]

    def _plan_updates(self, start: int) -> None:
        """Locate about 4,096 samples of this rank, for the update at the kept index `start` and later updates."""
        updates = max(1, _LOCATED_SAMPLES // self._samples)
        steps = self._accumulation * updates
        kept_indices = rank_positions(start, self._rank, self._data_parallel, self._micro_batch, steps)
        locations = self.sampler.locate(self._skipped.to_positions(kept_indices).reshape(-1))
        fds, widths = self._fds_and_widths[:, locations.source]
        reads = (fds, widths * (self.sampler.seq_len + 1), locations.start * widths)
        probes = slice(None, None, -(-len(fds) // _CACHE_PROBES))
        self._in_page_cache = _are_cached(zip(*(part[probes].tolist() for part in reads), strict=True))
        starts = range(start, start + updates * self._global_batch, self._global_batch)
        per_update = zip(*(part.reshape(updates, -1).tolist() for part in reads), strict=True)
        self._planned: dict[int, _Reads] = dict(zip(starts, per_update, strict=True))

    def _read(self, reads: _Reads) -> npt.NDArray[np.int64]:
        """Read the samples of one update, and return their ids `[accumulation, micro_batch, seq_len + 1]`."""
        length = self.sampler.seq_len + 1
        fds, sizes, offsets = reads
        try:
            content = b"".join(map(os.pread, *reads))
        except OSError:
            content = b""
        if len(content) != sum(sizes):  # read again with the reader, whose errors explain the failure
            content = b"".join(
                self._reader_by_fd[fd].read_range(offset * length // size, length)
                for fd, size, offset in zip(fds, sizes, offsets, strict=True)
            )
        if len(self._dtypes) == 1:  # converting all samples at once is twice as fast
            ids = np.frombuffer(content, self._dtypes[0])
        else:
            starts = itertools.accumulate(sizes[:-1], initial=0)
            ids = np.concatenate(
                [
                    np.frombuffer(content, self._reader_by_fd[fd].dtype, length, start)
                    for fd, start in zip(fds, starts, strict=True)
                ]
            )
        return ids.astype(np.int64).reshape(self._accumulation, self._micro_batch, length)

    def _batch(self, samples: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Batch:
        """Build a micro-batch from samples `[micro_batch, seq_len + 1]`. The ids are copied only to pinned memory."""
        batch = Batch(torch.from_numpy(samples[:, :-1]), torch.from_numpy(labels))
        if not self._pinned:
            return batch
        # The tensors are made contiguous first. Copying a tensor with gaps between its rows to a GPU would use memory
        # that is not pinned.
        return Batch(*(part.contiguous().pin_memory() for part in batch))


def _are_cached(reads: Iterable[tuple[int, int, int]]) -> bool:
    """Return True if all reads, given as (fd, bytes, offset), can be served from the page cache.

    Return False also if the filesystem cannot answer that.
    """
    try:
        return all(os.preadv(fd, [bytearray(size)], offset, os.RWF_NOWAIT) == size for fd, size, offset in reads)
    except OSError:  # the read would block, or the filesystem does not support this query
        return False


def _packed_labels(samples: npt.NDArray[np.int64], padding_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the labels of packed samples, in which padding is replaced by IGNORE_INDEX.

    A token is padding if both it and the token before it are the padding id.

    Args:
        samples: ids `[micro_batch, seq_len + 1]`.
        padding_ids: padding id of each sample `[micro_batch, 1]`, or IGNORE_INDEX if its source is not packed.
    """
    inputs, labels = samples[:, :-1], samples[:, 1:]
    return np.where((inputs == padding_ids) & (labels == padding_ids), IGNORE_INDEX, labels)


def check_vocabulary(reader: CorpusReader, vocab_size: int, tokenizer: str | None = None) -> int:
    """Check that the ids of a corpus belong to a model's vocabulary.

    The check uses the sidecar of the corpus, and the ids in 64 ranges spread over the corpus.

    Args:
        reader: reader of the corpus.
        vocab_size: number of ids in the model's vocabulary.
        tokenizer: path of the model's tokenizer. Its hash is checked if it is a file and the corpus has a sidecar.

    Returns:
        CRC-32 of the ids that were read.

    Raises:
        UserError: an id or the vocabulary of the corpus is too large, or the corpus was made with another tokenizer.
    """
    if reader.sidecar and tokenizer and Path(tokenizer).is_file():
        sha256 = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
        check_same_tokenizer(reader.prefix, reader.sidecar, tokenizer, sha256)
    do = "set model.vocab_size to that of the tokenizer, or prepare the corpus with the model's tokenizer"
    if reader.sidecar and reader.sidecar.vocab_size > vocab_size:
        what = f"the corpus has a vocabulary of {reader.sidecar.vocab_size}, but the model has only {vocab_size}"
        raise UserError(what, reader.prefix, do)
    probe = reader.probe
    unknown = probe[(probe < 0) | (probe >= vocab_size)]
    if unknown.size:
        what = f"the corpus holds token ids such as {unknown[0]}, but the model knows only 0 to {vocab_size - 1}"
        raise UserError(what, reader.prefix, do)
    return zlib.crc32(probe.tobytes())


def _check_packed(reader: CorpusReader, seq_len: int) -> None:
    """Raise UserError if a corpus is packed for another seq_len."""
    if reader.packed not in (None, seq_len):
        what = f"the corpus is packed for a seq_len of {reader.packed}, but the model has {seq_len}"
        do = f"set model.seq_len to {reader.packed}, or prepare the corpus with --pack {seq_len}"
        raise UserError(what, reader.prefix, do)


def _check_document_ends(reader: CorpusReader, end: int) -> None:
    """Raise UserError if one of 64 documents, spread over the corpus, does not end with the token `end`."""
    for index in np.linspace(0, len(reader.documents) - 2, _CHECKED_DOCUMENTS).astype(np.int64).tolist():
        document = reader.document(index)
        if len(document) and document[-1] != end:
            what = f"document {index} ends with the token {document[-1]}, not with the end-of-document token {end}"
            do = "correct data.eod, or prepare the corpus with an end-of-document token after each document"
            raise UserError(what, reader.prefix, do)


def _unverified_note(reader: CorpusReader) -> str:
    """Return a note for the user if a corpus has no sidecar, or "" if it has one.

    The note also warns if the corpus looks like a packed corpus.
    """
    if reader.sidecar:
        return ""
    missing = corpus_file(reader.prefix, ".json")
    note = f"{reader.prefix}: unverified, since it has no {missing.name}"
    sequences, tokens = len(reader), len(reader.tokens)
    checked = np.linspace(0, sequences - 1, min(sequences, _CHECKED_LENGTHS)).astype(np.int64)
    lengths = set(reader.lengths[checked].tolist())
    size = tokens // sequences
    if lengths != {size} or sequences != len(reader.documents) - 1 or sequences == 1:
        return note
    return (
        f"{note}; all its documents have {size:,} tokens, as if it was packed for a seq_len of {size - 1:,}, "
        "but without a sidecar samples cross document boundaries"
    )


def _is_same_content(one: CorpusReader, other: CorpusReader) -> bool:
    """Return whether two corpora hold the same tokens, by checksum, or by what is probed if one has no checksum."""
    if os.path.sameopenfile(one.fd, other.fd):
        return True
    if len(one.tokens) != len(other.tokens):
        return False
    if one.sidecar and other.sidecar and one.dtype == other.dtype:
        return one.sidecar.bin_crc32 == other.sidecar.bin_crc32
    return np.array_equal(one.probe, other.probe)


def _identity(reader: CorpusReader, weight: float, probe_crc32: int) -> dict[str, Any]:
    """Return a description that identifies a source independently of the location of its files."""
    sidecar = reader.sidecar
    identity = {
        "tokens": len(reader.tokens),
        "crc32": sidecar.bin_crc32 if sidecar else None,
        "probe_crc32": probe_crc32,
        "tokenizer_sha256": sidecar.tokenizer_sha256 if sidecar else None,
        "weight": weight,
    }
    if reader.packed:
        identity["packed"] = reader.packed
    return identity
