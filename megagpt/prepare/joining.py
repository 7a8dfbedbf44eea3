"""Shards to corpora: the documents of each part copied, in order or shuffled, without duplicates if so asked."""

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

from megagpt.data.id_file import BinWriter, ChecksummedRanges
from megagpt.data.indexed_writer import CorpusWriter, partial_bin_path
from megagpt.data.permutation import as_uint64, derive_keys, permute, radices
from megagpt.data.shards import ROW, Record, Rows
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import MachineError
from megagpt.prepare.encoding import cannot_write
from megagpt.prepare.ranks import Ranks

BLOCK = 1 << 16  # documents that are looked at together; a shuffle mixes them, and the blocks
_BYTES = 1 << 20  # copied at a time
_SEED = 0x6D656761  # of the shuffle: the same input gives the same order
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Block:
    """Documents `row` to `row + count` of a shard: the `first`-th of all, with ids from byte `start` on."""

    number: int
    row: int
    count: int
    first: int
    start: int


@dataclass(frozen=True)
class Choice:
    """Which documents of the shards in `folder` are copied, and in what order.

    `keep` says it of all documents, in the order of the input; None: all. An id has `width` bytes.
    """

    folder: Path
    records: Sequence[Record]
    width: int
    keep: npt.NDArray[np.bool_] | None
    shuffle: bool

    def blocks(self) -> list[_Block]:
        """All blocks, in the order in which they are copied."""
        blocks = list(_blocks(self.folder, self.records, self.width))
        return [blocks[place] for place in _order(len(blocks), 0, self.shuffle).tolist()]

    def chosen(self, block: _Block, rows: Rows, validation: bool) -> Numbers:
        """The documents of a block that go to one part, in order, as numbers of its `rows`."""
        order = _order(block.count, block.first + 1, self.shuffle)
        kept = rows["validation"] == validation
        if self.keep is not None:
            kept &= self.keep[block.first : block.first + block.count]
        chosen: Numbers = order[kept[order]]
        return chosen

    def id_bytes(self, blocks: Sequence[_Block], validation: bool) -> int:
        """What the ids of one part take."""
        rows = ((block, _rows(self.folder, block)) for block in blocks)
        return sum(int(found["tokens"][self.chosen(one, found, validation)].sum()) for one, found in rows) * self.width


@contextmanager
def joined(
    prefixes: Mapping[bool, str], model: Tokenizer, choice: Choice, ranks: Ranks
) -> Iterator[tuple[Mapping[bool, CorpusWriter], int]]:
    """The parts PREFIX, by whether they are for validation, with all chosen documents; and how many ids are unknown.

    Each rank writes the ids of its share of the documents straight into the files, where they belong. The first one
    makes the files and writes the index: it alone has the writers, which it may finish in the block.
    """
    with ExitStack() as stack:
        writers: dict[bool, CorpusWriter] = {}
        open_all = partial(_open, prefixes, model.vocab_size, stack, writers)
        ranks.first(open_all)
        blocks = choice.blocks()
        share = ranks.share(blocks)
        starts = {part: ranks.sum_before(partial(choice.id_bytes, share, part)) for part in prefixes}

        def copied() -> tuple[dict[bool, ChecksummedRanges], int]:
            with writing(choice.folder):
                if ranks.rank == 0:
                    _index(choice, blocks, writers)
                    return {}, _copy(
                        choice, share, {part: one.bin_file for part, one in writers.items()}, model.unknown
                    )
                with ExitStack() as files:
                    places = {part: (partial_bin_path(prefix), starts[part]) for part, prefix in prefixes.items()}
                    parts = {part: files.enter_context(BinWriter(*place)) for part, place in places.items()}
                    unknown = _copy(choice, share, parts, model.unknown)
                    return {part: file.finish() for part, file in parts.items()}, unknown

        (_, unknown), *others = ranks.each(copied)
        for part, writer in writers.items():
            writer.other_ranges = [stretch for stretches, _ in others for stretch in stretches[part]]
        yield writers, unknown + sum(count for _, count in others)


def _open(prefixes: Mapping[bool, str], vocab_size: int, stack: ExitStack, writers: dict[bool, CorpusWriter]) -> None:
    for part, prefix in prefixes.items():
        writers[part] = stack.enter_context(CorpusWriter(prefix, vocab_size))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Where what cannot be written is said in the user's words."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error, folder) from None


def _copy(choice: Choice, blocks: Sequence[_Block], parts: Mapping[bool, BinWriter], unknown: int | None) -> int:
    """Copy the ids of the blocks into their part, and count those that are `unknown`. Memory does not grow."""
    unknowns = 0
    for block in blocks:
        rows = _rows(choice.folder, block)
        ids = os.open(choice.folder / f"{block.number}.bin", os.O_RDONLY)
        try:
            for validation, part in parts.items():
                for found in _ids(rows, choice.chosen(block, rows, validation), block.start, ids, choice):
                    part.write(found)
                    if unknown is not None:
                        unknowns += int(np.count_nonzero(np.frombuffer(found, f"<u{choice.width}") == unknown))
        finally:
            os.close(ids)
    return unknowns


def _index(choice: Choice, blocks: Sequence[_Block], parts: Mapping[bool, CorpusWriter]) -> None:
    """End the documents of the blocks in their part."""
    for block in blocks:
        rows = _rows(choice.folder, block)
        for validation, part in parts.items():
            chosen = rows[choice.chosen(block, rows, validation)]
            part.end_documents(chosen["tokens"], int(chosen["text_bytes"].sum()))


def _blocks(folder: Path, records: Sequence[Record], width: int) -> Iterator[_Block]:
    first = 0
    for record in records:
        start = 0
        for row in range(0, record.documents, BLOCK):
            block = _Block(record.number, row, min(BLOCK, record.documents - row), first + row, start)
            yield block
            if row + BLOCK < record.documents:
                start += int(_rows(folder, block)["tokens"].sum()) * width
        first += record.documents


def _rows(folder: Path, block: _Block) -> Rows:
    return np.fromfile(folder / f"{block.number}.rows", ROW, block.count, offset=block.row * ROW.itemsize)


def _order(count: int, key: int, shuffle: bool) -> Numbers:
    """The numbers below `count`, shuffled by a key if so asked."""
    if not shuffle or count < 2:
        return np.arange(count)
    a, b = (as_uint64([side]) for side in radices(count))
    numbers = permute(np.arange(count, dtype=np.uint64), as_uint64([count]), a, b, derive_keys(_SEED, key))
    return numbers.astype(np.int64)


def _ids(rows: Rows, chosen: Numbers, start: int, ids: int, choice: Choice) -> Iterator[bytes]:
    """The ids of the chosen documents of `rows`, whose own begin at byte `start` of the open file `ids`."""
    if not len(chosen):
        return
    ends = start + np.cumsum(rows["tokens"]) * choice.width
    begins = np.concatenate([[start], ends[:-1]])
    # Neighbours in the shard that stay neighbours are copied in one go.
    breaks = np.diff(chosen) != 1
    firsts, lasts = np.append(True, breaks), np.append(breaks, True)
    for begin, end in zip(begins[chosen[firsts]].tolist(), ends[chosen[lasts]].tolist(), strict=True):
        while begin < end:
            block = os.pread(ids, min(end - begin, _BYTES), begin)
            if not block:
                do = "remove this folder, and try again"
                raise MachineError("a shard was cut short", str(choice.folder), do)
            yield block
            begin += len(block)


def digests(folder: Path, records: Sequence[Record]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The hashes of all documents, block by block: the number of the first, and two uint64 each `[count, 2]`."""
    for block in _blocks(folder, records, 1):
        digest = np.ascontiguousarray(_rows(folder, block)["digest"])
        yield block.first, digest.view("<u8").reshape(-1, 2)
