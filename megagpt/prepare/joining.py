"""Shards to corpora: the documents of each part copied, in order or shuffled, without duplicates if so asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed_writer import Writer
from megagpt.data.permutation import as_numbers, keys, permute, sides
from megagpt.data.shards import ROW, Record, Rows
from megagpt.errors import MachineError

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


def join(
    folder: Path,
    records: Sequence[Record],
    parts: Mapping[bool, Writer],
    keep: npt.NDArray[np.bool_] | None = None,
    shuffle: bool = False,
    unknown: int | None = None,
) -> int:
    """Copy the documents of the shards into `parts[validation]`, and count the ids that are `unknown`.

    `keep` says which of all documents, in the order of the input, are copied; None: all. Memory does not grow with
    the corpus.
    """
    width, unknowns = parts[False].dtype.itemsize, 0
    blocks = list(_blocks(folder, records, width))
    for place in _order(len(blocks), 0, shuffle).tolist():
        block = blocks[place]
        rows = _rows(folder, block)
        kept = np.ones(block.count, bool) if keep is None else keep[block.first : block.first + block.count]
        order = _order(block.count, block.first + 1, shuffle)
        ids = os.open(folder / f"{block.number}.bin", os.O_RDONLY)
        try:
            for validation, part in parts.items():
                chosen = order[(kept & (rows["validation"] == validation))[order]]
                unknowns += _copy(rows, chosen, block.start, ids, part, unknown)
        finally:
            os.close(ids)
    return unknowns


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
    a, b = (as_numbers([side]) for side in sides(count))
    numbers = permute(np.arange(count, dtype=np.uint64), as_numbers([count]), a, b, keys(_SEED, key))
    return numbers.astype(np.int64)


def _copy(rows: Rows, chosen: Numbers, start: int, ids: int, part: Writer, unknown: int | None) -> int:
    """Copy the chosen documents of `rows`, the ids of which begin at byte `start` of the open file `ids`."""
    unknowns = 0
    ends = start + np.cumsum(rows["tokens"]) * part.dtype.itemsize
    begins = np.concatenate([[start], ends[:-1]])
    # Neighbours in the shard that stay neighbours are copied in one go.
    if not len(chosen):
        return 0
    breaks = np.diff(chosen) != 1
    firsts, lasts = np.append(True, breaks), np.append(breaks, True)
    runs = zip(begins[chosen[firsts]].tolist(), ends[chosen[lasts]].tolist(), strict=True)
    for begin, end in runs:
        while begin < end:
            block = os.pread(ids, min(end - begin, _BYTES), begin)
            if not block:
                raise MachineError("a shard was cut short", part.prefix, "remove its .prepare folder, and try again")
            part.write_ids(block)
            begin += len(block)
            if unknown is not None:
                unknowns += int(np.count_nonzero(np.frombuffer(block, part.dtype) == unknown))
    part.end_documents(rows["tokens"][chosen], int(rows["text_bytes"][chosen].sum()))
    return unknowns


def digests(folder: Path, records: Sequence[Record]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The hashes of all documents, block by block: the number of the first, and two uint64 each `[count, 2]`."""
    for block in _blocks(folder, records, 1):
        digest = np.ascontiguousarray(_rows(folder, block)["digest"])
        yield block.first, digest.view("<u8").reshape(-1, 2)
