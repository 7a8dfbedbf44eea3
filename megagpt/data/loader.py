"""Batches of one data-parallel rank, read straight from the corpora as they are needed."""

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

from megagpt.data.indexed import CorpusReader, corpus_file
from megagpt.data.order import Sampler, rank_positions
from megagpt.data.sidecar import check_same_tokenizer
from megagpt.data.skips import SkippedRanges
from megagpt.errors import UserError
from megagpt.state import IGNORE_INDEX

_AT_ONCE = 4096  # samples that are located together: hardly dearer than a handful
_LOOKED_AT = 64  # of those, to see whether they are in memory
_DOCUMENTS = 64  # whose last token is looked at
_LENGTHS = 1024  # of sequences that are compared
_Reads = tuple[list[int], list[int], list[int]]  # files, bytes, offsets: as os.pread takes them


class Batch(NamedTuple):
    """One micro-batch: `input_ids` and `labels` (shifted already), int64 `[micro, seq]`."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Loader:
    """Gives the micro-batches of one data-parallel rank for the update at any data position.

    `sources` are (prefix, weight) pairs; a weight counts samples, or with `by_epochs` times through the source, and
    only in relation to the others. `skip` are the (first, last) data positions that are left out. `order` says which
    sample comes when; `notes` says which corpora are unverified; `fingerprint` (plain JSON values) names the data and
    its order, for comparison on resume. `pinned` batches can be copied to a GPU while it computes.
    Raises UserError where a corpus is missing, damaged, too short, made by another tokenizer, packed for another
    seq_len, or holds ids that the model does not know.
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
        packed = [number for number, reader in enumerate(self._readers) if reader.packed]
        self.sampler = Sampler([len(reader.tokens) for reader in self._readers], weights, seq_len, seed, packed)
        self.notes = tuple(note for reader in self._readers if (note := unverified(reader)))
        self.fingerprint: dict[str, Any] = {
            "seq_len": seq_len,
            "seed": seed,
            "sources": [_facts(*source) for source in zip(self._readers, weights, probes, strict=True)],
        }
        self._in_turn = itertools.cycle(self._readers)
        self._opened = np.array([(reader.fd, reader.dtype.itemsize) for reader in self._readers]).T
        self._by_file = {reader.fd: reader for reader in self._readers}
        self._fillers = {r.file: r.sidecar.eod for r in self._readers if r.sidecar and r.packed}
        self._kinds = list({reader.dtype for reader in self._readers})
        self._skips, self._pinned = SkippedRanges(skip), pinned
        self._share = (rank, data_parallel, micro_batch)
        self._shape = (accumulation, micro_batch)
        self._samples = micro_batch * accumulation
        self._global_batch = data_parallel * self._samples
        self._begin_at(0)

    def batches(self, position: int) -> list[Batch]:
        """The micro-batches `[accumulation]` of the update that begins at this data position.

        The samples of the update after it are asked for from the disk on the way, unless they seem to be in memory.
        Raises CorpusChanged where a corpus is no longer what was opened: at once if it was cut short, else when its
        turn comes to be looked at.
        """
        next(self._in_turn).check_unchanged()
        number = self._skips.number(position)
        stretches = self._of_update(number)
        samples = self._read(stretches)
        if not self._cached:
            for file, size, offset in zip(*self._of_update(number + self._global_batch), strict=True):
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
        if not self._fillers:
            return [self._batch(micro, micro[:, 1:]) for micro in samples]
        fillers = np.array([self._fillers.get(file, IGNORE_INDEX) for file in stretches[0]]).reshape(*self._shape, 1)
        return [self._batch(micro, _labels(micro, f)) for micro, f in zip(samples, fillers, strict=True)]

    def document_end(self, given: int | None) -> int:
        """The token id that ends each document: what the corpora say, or `given`.

        Raises UserError where neither says it, where they differ, or where documents end otherwise.
        """
        ends: dict[int, str] = {} if given is None else {given: "data.eod"}
        for reader in self._readers:
            if reader.sidecar:
                ends.setdefault(reader.sidecar.eod, reader.prefix)
        if len(ends) != 1:
            said = "\n".join(f"{end}  {where}" for end, where in ends.items())
            what = "the corpora do not agree" if ends else "no corpus says"
            do = "prepare the corpora with one tokenizer" if ends else "give data.eod"
            raise UserError(f"{what} which token ends a document", said or "data.document_mask", do)
        (end,) = ends
        for reader in self._readers:
            if reader.fd not in self._fillers:  # a document longer than a sample ends elsewhere
                _check_ends(reader, end)
        return end

    def positions_used(self, position: int) -> int:
        """How many data positions the update at `position` uses up: the global batch, and what is left out by hand."""
        last = self._skips.number(position) + self._global_batch - 1
        return int(self._skips.positions(np.array([last]))[0]) + 1 - position

    def _of_update(self, number: int) -> _Reads:
        """This rank's samples of the update that begins at the kept position of this number."""
        if number not in self._updates:
            self._begin_at(number)
        return self._updates[number]

    def _begin_at(self, number: int) -> None:
        """Have the updates ready of some 4,096 samples from a kept position on."""
        count = max(1, _AT_ONCE // self._samples)
        positions = self._skips.positions(rank_positions(number, *self._share, self._shape[0] * count))
        located = self.sampler.locate(positions.reshape(-1))
        files, widths = self._opened[:, located.source]
        parts = (files, widths * (self.sampler.seq_len + 1), located.start * widths)
        looked_at = slice(None, None, -(-len(files) // _LOOKED_AT))
        self._cached = _are_cached(zip(*(part[looked_at].tolist() for part in parts), strict=True))
        numbers = range(number, number + count * self._global_batch, self._global_batch)
        updates = zip(*(part.reshape(count, -1).tolist() for part in parts), strict=True)
        self._updates: dict[int, _Reads] = dict(zip(numbers, updates, strict=True))

    def _read(self, stretches: _Reads) -> npt.NDArray[np.int64]:
        """Samples `[accumulation, micro, seq + 1]`."""
        readers, length = self._by_file, self.sampler.seq_len + 1
        try:
            content = b"".join(map(os.pread, *stretches))
        except OSError:
            content = b""
        files, sizes, offsets = stretches
        if len(content) != sum(sizes):  # once more, by what says what is wrong
            starts = (offset * length // size for size, offset in zip(sizes, offsets, strict=True))
            content = b"".join(
                readers[file].read_range(start, length) for file, start in zip(files, starts, strict=True)
            )
        if len(self._kinds) == 1:  # cast together: twice as fast
            ids = np.frombuffer(content, self._kinds[0])
        else:
            begins = itertools.accumulate(sizes[:-1], initial=0)
            each = zip(files, begins, strict=True)
            ids = np.concatenate([np.frombuffer(content, readers[file].dtype, length, at) for file, at in each])
        return ids.astype(np.int64).reshape(*self._shape, length)

    def _batch(self, samples: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Batch:
        """One micro-batch out of its samples `[micro, seq + 1]`, which it shares the memory of."""
        batch = Batch(torch.from_numpy(samples[:, :-1]), torch.from_numpy(labels))
        # contiguous first: what is copied with gaps between its rows goes by way of memory that is not pinned
        return Batch(*(part.contiguous().pin_memory() for part in batch)) if self._pinned else batch


def _are_cached(stretches: Iterable[tuple[int, int, int]]) -> bool:
    """Whether these (file, bytes, offset) are all in memory, as far as the file system can tell: no disk is asked."""
    try:
        return all(os.preadv(file, [bytearray(size)], at, os.RWF_NOWAIT) == size for file, size, at in stretches)
    except OSError:  # it would have to wait, or cannot tell
        return False


def _labels(samples: npt.NDArray[np.int64], fillers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Labels of packed samples: what fills them up, an id of `fillers` `[micro, 1]` after itself, is none."""
    inputs, labels = samples[:, :-1], samples[:, 1:]
    return np.where((inputs == fillers) & (labels == fillers), IGNORE_INDEX, labels)


def check_vocabulary(reader: CorpusReader, vocab_size: int, tokenizer: str | None = None) -> int:
    """Compare the ids at 64 places spread over the corpus with the model's vocabulary; crc32 of what was seen.

    Raises UserError if an id does not fit, or if the corpus says itself that its vocabulary is larger, or that it was
    made by another tokenizer than the one in this file.
    """
    if reader.sidecar and tokenizer and Path(tokenizer).is_file():
        sha256 = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
        check_same_tokenizer(reader.prefix, reader.sidecar, tokenizer, sha256)
    do = "set model.vocab_size to the tokenizer's, or prepare the corpus with the model's tokenizer"
    if reader.sidecar and reader.sidecar.vocab_size > vocab_size:
        what = f"the corpus has a vocabulary of {reader.sidecar.vocab_size}, the model only one of {vocab_size}"
        raise UserError(what, reader.prefix, do)
    probe = reader.probe
    odd = probe[(probe < 0) | (probe >= vocab_size)]
    if odd.size:
        what = f"the corpus holds token ids such as {odd[0]}, the model knows 0 to {vocab_size - 1}"
        raise UserError(what, reader.prefix, do)
    return zlib.crc32(probe.tobytes())


def _check_packed(reader: CorpusReader, seq_len: int) -> None:
    """Raise UserError if a corpus is packed for samples of another length."""
    if reader.packed not in (None, seq_len):
        what = f"the corpus is packed for a seq_len of {reader.packed}, the model has one of {seq_len}"
        do = f"set model.seq_len to {reader.packed}, or prepare the corpus with --pack {seq_len}"
        raise UserError(what, reader.prefix, do)


def _check_ends(reader: CorpusReader, end: int) -> None:
    """Raise UserError if one of 64 documents spread over the corpus does not end with `end`."""
    for number in np.linspace(0, len(reader.documents) - 2, _DOCUMENTS).astype(np.int64).tolist():
        document = reader.document(number)
        if len(document) and document[-1] != end:
            what = f"document {number} ends with the token {document[-1]}, not with {end}, which ends documents"
            raise UserError(
                what, reader.prefix, "set data.eod right, or prepare the corpus with an end of each document"
            )


def unverified(reader: CorpusReader) -> str:
    """A sentence for people if the corpus comes without a sidecar, else nothing. It may have been a packed one."""
    if reader.sidecar:
        return ""
    missing = corpus_file(reader.prefix, ".json")
    told = f"{reader.prefix}: unverified (no {missing.name} says how it was made)"
    count, tokens = len(reader), len(reader.tokens)
    lengths = set(reader.lengths[np.linspace(0, count - 1, min(count, _LENGTHS)).astype(np.int64)].tolist())
    if lengths != {tokens // count} or count != len(reader.documents) - 1 or count == 1:
        return told
    size = tokens // count
    return f"{told}; all its documents have {size:,} tokens, as if packed for a seq_len of {size - 1:,}: read across"


def _facts(reader: CorpusReader, weight: float, probe: int) -> dict[str, Any]:
    """What tells one corpus from another, wherever it lies."""
    said = reader.sidecar
    facts = {
        "tokens": len(reader.tokens),
        "crc32": said.bin_crc32 if said else None,
        "probe_crc32": probe,
        "tokenizer_sha256": said.tokenizer_sha256 if said else None,
        "weight": weight,
    }
    return facts | ({"packed": reader.packed} if reader.packed else {})
