"""Merges shards into the training and validation parts of a corpus, in input order or shuffled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.bin_writer import BinWriter, ChecksummedRanges
from megagpt.corpus.writer import CorpusWriter, partial_bin_path
from megagpt.data.permutation import as_uint64, derive_keys, permute, radices
from megagpt.errors import MachineError
from megagpt.prepare.encode import write_error
from megagpt.prepare.process_group import ProcessGroup
from megagpt.prepare.shards import ROW_DTYPE, Rows, ShardRecord
from megagpt.tokenizer.tokenizer import Tokenizer

# Number of documents per block. A shuffle permutes the documents within each block, and the order of the blocks.
BLOCK_DOCUMENTS = 1 << 16
_COPY_BYTES = 1 << 20  # number of bytes copied at a time
_SHUFFLE_SEED = 0x6D656761  # the seed is fixed, so that the same input gives the same order
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents of a shard.

    Attributes:
        shard: The number of the shard.
        row: The index of the block's first document in the shard.
        count: The number of documents.
        first: The index of the block's first document in the whole input.
        start: The byte offset in the shard's .bin file at which the ids of the first document begin.
    """

    shard: int
    row: int
    count: int
    first: int
    start: int


@dataclass(frozen=True)
class DocumentSelection:
    """Selection and order of the documents that are copied from the shards to each part of the corpus.

    Attributes:
        folder: The folder of the shards.
        records: The records of all shards.
        id_bytes: Bytes per token id.
        keep: One bool per document of the input, True for documents to copy. If None, all documents are copied.
        shuffle: True if the documents are shuffled.
    """

    folder: Path
    records: Sequence[ShardRecord]
    id_bytes: int
    keep: npt.NDArray[np.bool_] | None
    shuffle: bool

    def blocks(self) -> list[DocumentBlock]:
        """Return all blocks, in the order in which they are copied."""
        blocks = list(_blocks(self.folder, self.records, self.id_bytes))
        return [blocks[index] for index in _permutation(len(blocks), 0, self.shuffle).tolist()]

    def select(self, block: DocumentBlock, rows: Rows, validation: bool) -> Integers:
        """Return the documents of a block that are copied to one part, in the order in which they are copied.

        Args:
            block: The block.
            rows: The rows of the block's documents.
            validation: True for the validation part, False for the training part.

        Returns:
            The indices of the documents in `rows`.
        """
        order = _permutation(block.count, block.first + 1, self.shuffle)
        is_selected = rows["validation"] == validation
        if self.keep is not None:
            is_selected &= self.keep[block.first : block.first + block.count]
        selected: Integers = order[is_selected[order]]
        return selected

    def total_id_bytes(self, blocks: Sequence[DocumentBlock], validation: bool) -> int:
        """Return the total size, in bytes, of the ids that are copied from the given blocks to one part."""
        tokens = 0
        for block in blocks:
            rows = _read_rows(self.folder, block)
            tokens += int(rows["tokens"][self.select(block, rows, validation)].sum())
        return tokens * self.id_bytes


@contextmanager
def merge_shards(
    prefixes: Mapping[bool, str], tokenizer: Tokenizer, selection: DocumentSelection, ranks: ProcessGroup
) -> Iterator[tuple[Mapping[bool, CorpusWriter], int]]:
    """Write the selected documents to the parts of a corpus. Collective.

    Each rank writes the ids of its documents directly to their final offsets in the files. The first rank creates the
    files and writes the indexes. Only the first rank receives the writers, and it may finish them within the `with`
    block.

    Args:
        prefixes: The prefix of each part, where the key False is the training part and True the validation part.
        tokenizer: The tokenizer.
        selection: The documents to write.
        ranks: The processes that share the work.

    Yields:
        The writer of each part (empty on all ranks except the first), and the number of unknown ids in all parts.
    """
    with ExitStack() as stack:
        writers: dict[bool, CorpusWriter] = {}

        def open_writers() -> None:
            for part, prefix in prefixes.items():
                writers[part] = stack.enter_context(CorpusWriter(prefix, tokenizer.vocab_size))

        ranks.first(open_writers)
        blocks = selection.blocks()
        own = ranks.local_part(blocks)
        starts = {part: ranks.sum_before(partial(selection.total_id_bytes, own, part)) for part in prefixes}

        def copy_own() -> tuple[dict[bool, ChecksummedRanges], int]:
            with report_write_errors(selection.folder):
                if ranks.rank == 0:
                    _write_index(selection, blocks, writers)
                    files = {part: writer.bin_file for part, writer in writers.items()}
                    return {}, _copy_ids(selection, own, files, tokenizer.unknown)
                with ExitStack() as opened:
                    files = {
                        part: opened.enter_context(BinWriter(partial_bin_path(prefix), starts[part]))
                        for part, prefix in prefixes.items()
                    }
                    unknown = _copy_ids(selection, own, files, tokenizer.unknown)
                    return {part: file.finish() for part, file in files.items()}, unknown

        (_, unknown), *others = ranks.each(copy_own)
        for part, writer in writers.items():
            writer.other_ranges = [written for ranges, _ in others for written in ranges[part]]
        yield writers, unknown + sum(count for _, count in others)


@contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Convert every OSError within the `with` block to a user-facing MachineError about `folder`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, folder) from None


def document_digests(folder: Path, records: Sequence[ShardRecord]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the hashes of all documents, block by block.

    Args:
        folder: The folder of the shards.
        records: The records of all shards.

    Yields:
        The index of the block's first document in the whole input, and the hashes of the block's documents as uint64
        `[documents, 2]`.
    """
    for block in _blocks(folder, records, 1):
        digest = np.ascontiguousarray(_read_rows(folder, block)["digest"])
        yield block.first, digest.view("<u8").reshape(-1, 2)


def _write_index(
    selection: DocumentSelection, blocks: Sequence[DocumentBlock], writers: Mapping[bool, CorpusWriter]
) -> None:
    """Add the selected documents of all blocks to the indexes of their parts."""
    for block in blocks:
        rows = _read_rows(selection.folder, block)
        for validation, writer in writers.items():
            selected = rows[selection.select(block, rows, validation)]
            writer.end_documents(selected["tokens"], int(selected["text_bytes"].sum()))


def _copy_ids(
    selection: DocumentSelection, blocks: Sequence[DocumentBlock], files: Mapping[bool, BinWriter], unknown: int | None
) -> int:
    """Copy the ids of the given blocks to the files of their parts. Returns the number of ids equal to `unknown`."""
    unknown_count = 0
    for block in blocks:
        rows = _read_rows(selection.folder, block)
        shard = os.open(selection.folder / f"{block.shard}.bin", os.O_RDONLY)
        try:
            for validation, file in files.items():
                selected = selection.select(block, rows, validation)
                for ids in _read_ids(shard, rows, selected, block.start, selection):
                    file.write(ids)
                    if unknown is not None:
                        is_unknown = np.frombuffer(ids, f"<u{selection.id_bytes}") == unknown
                        unknown_count += int(np.count_nonzero(is_unknown))
        finally:
            os.close(shard)
    return unknown_count


def _read_ids(shard: int, rows: Rows, selected: Integers, start: int, selection: DocumentSelection) -> Iterator[bytes]:
    """Yield the ids of the selected documents.

    The ids of the first document in `rows` begin at byte `start` of `shard`, a file descriptor.
    """
    if not len(selected):
        return
    ends = start + np.cumsum(rows["tokens"]) * selection.id_bytes
    begins = np.concatenate([[start], ends[:-1]])
    # Documents that are consecutive both in the shard and in the part are copied together.
    is_break = np.diff(selected) != 1
    firsts, lasts = selected[np.append(True, is_break)], selected[np.append(is_break, True)]
    for begin, end in zip(begins[firsts].tolist(), ends[lasts].tolist(), strict=True):
        offset = begin
        while offset < end:
            ids = os.pread(shard, min(end - offset, _COPY_BYTES), offset)
            if not ids:
                raise MachineError("a shard was truncated", str(selection.folder), "remove this folder, and try again")
            yield ids
            offset += len(ids)


def _blocks(folder: Path, records: Sequence[ShardRecord], id_bytes: int) -> Iterator[DocumentBlock]:
    first = 0
    for record in records:
        start = 0
        for row in range(0, record.documents, BLOCK_DOCUMENTS):
            count = min(BLOCK_DOCUMENTS, record.documents - row)
            block = DocumentBlock(record.number, row, count, first + row, start)
            yield block
            if row + BLOCK_DOCUMENTS < record.documents:
                start += int(_read_rows(folder, block)["tokens"].sum()) * id_bytes
        first += record.documents


def _read_rows(folder: Path, block: DocumentBlock) -> Rows:
    offset = block.row * ROW_DTYPE.itemsize
    return np.fromfile(folder / f"{block.shard}.rows", ROW_DTYPE, block.count, offset=offset)


def _permutation(count: int, key: int, shuffle: bool) -> Integers:
    """Return the integers from 0 to `count` - 1, permuted with the key `key` if `shuffle` is set."""
    if not shuffle or count < 2:
        return np.arange(count)
    a, b = (as_uint64([side]) for side in radices(count))
    permuted = permute(np.arange(count, dtype=np.uint64), as_uint64([count]), a, b, derive_keys(_SHUFFLE_SEED, key))
    return permuted.astype(np.int64)
