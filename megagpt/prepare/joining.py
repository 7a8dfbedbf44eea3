"""Shards to corpora: the documents of each part copied in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed_writer import Writer
from megagpt.data.shards import ROW, Record, Rows
from megagpt.errors import MachineError

_ROWS, _BYTES = 1 << 16, 1 << 20  # copied at a time


def join(folder: Path, records: Iterable[Record], parts: Mapping[bool, Writer]) -> None:
    """Copy every document of the shards into its part: `parts[validation]`."""
    for record in records:
        with (
            (folder / f"{record.number}.rows").open("rb") as rows_file,
            (folder / f"{record.number}.bin").open("rb", buffering=_BYTES) as bin_file,
        ):
            start = 0
            while len(rows := np.fromfile(rows_file, ROW, _ROWS)):
                for validation, part in parts.items():
                    _copy(rows, rows["validation"] == validation, start, bin_file, part)
                start += int(rows["tokens"].sum()) * next(iter(parts.values())).dtype.itemsize


def _copy(rows: Rows, chosen: npt.NDArray[np.bool_], start: int, file: IO[bytes], part: Writer) -> None:
    """Copy the chosen documents of `rows`, the ids of which begin at byte `start` of the file."""
    ends = start + np.cumsum(rows["tokens"]) * part.dtype.itemsize
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)  # runs of chosen documents
    bounds = np.concatenate([[start], ends])
    for begin, end in bounds[edges].tolist():
        file.seek(begin)
        while begin < end:
            block = file.read(min(end - begin, _BYTES))
            if not block:
                raise MachineError(
                    "a shard was cut short", str(file.name), "remove its folder and type the command again"
                )
            part.write_ids(block)
            begin += len(block)
    part.end_documents(rows["tokens"][chosen], int(rows["text_bytes"][chosen].sum()))
