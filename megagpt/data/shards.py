"""A shard: what one piece of the input was encoded to. Whole once its record is there, which comes last.

`NUMBER.bin` holds the ids of all documents, as .bin does; `NUMBER.rows` has a row for each document; `NUMBER.json`
is the record.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.oddities import Oddities, Place
from megagpt.files import ChecksummedFile, parse_json

ROW = np.dtype([("tokens", "<i8"), ("text_bytes", "<i8"), ("validation", "?"), ("digest", "V16")])
_ROW = struct.Struct("<qq?16s")
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Record:
    """Facts of a whole shard. `text_bytes` are of its documents; the sizes (bytes) and CRC-32 are of its files."""

    number: int
    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    bin_crc32: int
    rows_crc32: int
    oddities: Oddities


class ShardWriter:
    """Writes one shard; what is given is kept until `flush`. Leaving the `with` block without `finish` removes it."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self.documents = self.tokens = self.text_bytes = self._bin_bytes = 0
        self._bin = ChecksummedFile(self._partial("bin"))
        self._rows = ChecksummedFile(self._partial("rows"))
        self._new_ids: list[bytes] = []
        self._new_rows: list[bytes] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._bin, self._rows):
            with suppress(OSError):  # of a full disk, which the error on its way has said
                file.close()
        for suffix in ("bin", "rows"):
            self._partial(suffix).unlink(missing_ok=True)

    def write(self, ids: bytes) -> None:
        """Append ids of the document that has not ended yet."""
        self._new_ids.append(ids)

    def end_document(self, tokens: int, text_bytes: int, validation: bool, digest: bytes) -> None:
        """End a document of so many tokens and bytes of text; `digest` is the hash of the text."""
        self._new_rows.append(_ROW.pack(tokens, text_bytes, validation, digest))
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += text_bytes

    def flush(self) -> None:
        """Write what has been given."""
        self._bin_bytes += sum(map(len, self._new_ids))
        for file, new in ((self._bin, self._new_ids), (self._rows, self._new_rows)):
            file.write(b"".join(new))
            new.clear()

    def finish(self, oddities: Oddities) -> Record:
        """Name the files, and write the record when they are on the disk."""
        self.flush()
        for file, suffix in ((self._bin, "bin"), (self._rows, "rows")):
            file.sync()
            self._partial(suffix).replace(self._folder / f"{self._number}.{suffix}")
        record = Record(
            self._number, self.documents, self.tokens, self.text_bytes, self._bin_bytes,
            self._bin.crc32, self._rows.crc32, oddities,
        )  # fmt: skip
        with ChecksummedFile(self._partial("json")) as file:
            file.write(json.dumps(asdict(record)).encode())
            file.sync()
        self._partial("json").replace(self._folder / f"{self._number}.json")
        return record

    def _partial(self, suffix: str) -> Path:
        # The number of the process: one that was left over from a killed command must not write into ours.
        return self._folder / f"{self._number}.{suffix}.{os.getpid()}.partial"


def read_record(folder: Path, number: int) -> Record | None:
    """The record of a whole shard, or None where there is none or its files are not what it says."""
    try:
        content: dict[str, Any] = parse_json((folder / f"{number}.json").read_bytes())
        odd = content.pop("oddities")
        first = {kind: Place(*place) for kind, place in odd["first"].items()}
        lines = {int(source): count for source, count in odd["lines"].items()}
        record = Record(**content, oddities=Oddities(odd["strict"], odd["counts"], first, lines))
        sizes = [(folder / f"{number}.{suffix}").stat().st_size for suffix in ("bin", "rows")]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if sizes == [record.bin_bytes, record.documents * ROW.itemsize] else None
