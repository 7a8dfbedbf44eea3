"""Shards, the files to which the chunks of the input are encoded.

A shard consists of three files. `NUMBER.bin` holds the token ids of all documents, in the format of a corpus's .bin
file. `NUMBER.rows` has one row of type `ROW_DTYPE` per document. `NUMBER.json` is the record. It is written last, and a
shard is complete if its record exists.
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

from megagpt.files import ChecksummedFile, crc32, parse_json
from megagpt.prepare.input_warnings import InputLocation, InputWarnings

ROW_DTYPE = np.dtype([("tokens", "<i8"), ("text_bytes", "<i8"), ("validation", "?"), ("digest", "V16")])
_ROW = struct.Struct("<qq?16s")
Rows = npt.NDArray[np.void]
SUFFIXES = ("bin", "rows", "json")


@dataclass(frozen=True)
class ShardRecord:
    """Record of a complete shard.

    Attributes:
        number: The number of the shard, which is also the number of its chunk.
        documents: The number of documents.
        tokens: The number of tokens, including end-of-document symbols.
        text_bytes: The size of the documents' text in bytes of UTF-8.
        bin_bytes: The size of `NUMBER.bin` in bytes.
        bin_crc32: CRC-32 of `NUMBER.bin`.
        rows_crc32: CRC-32 of `NUMBER.rows`.
        warnings: The warnings about unusual input in the chunk.
    """

    number: int
    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    bin_crc32: int
    rows_crc32: int
    warnings: InputWarnings


class ShardWriter:
    """Writes one shard.

    Ids and rows are buffered until `flush` is called. If the `with` block ends and `finish` was not called, the files
    are removed.
    """

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
            with suppress(OSError):  # if the disk is full, the write has already raised an error
                file.close()
        for suffix in ("bin", "rows"):
            self._partial(suffix).unlink(missing_ok=True)

    def write(self, ids: bytes) -> None:
        """Append ids, given as the bytes of .bin, to the current document."""
        self._new_ids.append(ids)

    def end_document(self, tokens: int, text_bytes: int, validation: bool, digest: bytes) -> None:
        """End the current document.

        Args:
            tokens: The number of tokens in the document.
            text_bytes: The size of the document's text in bytes of UTF-8.
            validation: True if the document belongs to the validation part.
            digest: The 16-byte hash of the document's text.
        """
        self._new_rows.append(_ROW.pack(tokens, text_bytes, validation, digest))
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += text_bytes

    def flush(self) -> None:
        """Write the buffered ids and rows."""
        self._bin_bytes += sum(map(len, self._new_ids))
        for file, new in ((self._bin, self._new_ids), (self._rows, self._new_rows)):
            file.write(b"".join(new))
            new.clear()

    def finish(self, warnings: InputWarnings) -> ShardRecord:
        """Flush the files, rename them to their final names, and write the record. Returns the record."""
        self.flush()
        for file, suffix in ((self._bin, "bin"), (self._rows, "rows")):
            file.sync()
            self._partial(suffix).replace(self._folder / f"{self._number}.{suffix}")
        record = ShardRecord(
            number=self._number,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            bin_bytes=self._bin_bytes,
            bin_crc32=self._bin.crc32,
            rows_crc32=self._rows.crc32,
            warnings=warnings,
        )
        with ChecksummedFile(self._partial("json")) as file:
            file.write(json.dumps(asdict(record)).encode())
            file.sync()
        self._partial("json").replace(self._folder / f"{self._number}.json")
        return record

    def _partial(self, suffix: str) -> Path:
        # The name contains the process id, so that a process left over from a killed command cannot write to our file.
        return self._folder / f"{self._number}.{suffix}.{os.getpid()}.partial"


def read_shard_record(folder: Path, number: int) -> ShardRecord | None:
    """Return the record of a shard, or None if the shard is incomplete or its files have the wrong size.

    This does not read the content of the files. `is_intact` compares it with the checksums.
    """
    try:
        content: dict[str, Any] = parse_json((folder / f"{number}.json").read_bytes())
        warnings = content.pop("warnings")
        first = {kind: InputLocation(*location) for kind, location in warnings["first"].items()}
        lines = {int(file): count for file, count in warnings["lines"].items()}
        record = ShardRecord(**content, warnings=InputWarnings(warnings["strict"], warnings["counts"], first, lines))
        sizes = [(folder / f"{number}.{suffix}").stat().st_size for suffix in ("bin", "rows")]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if sizes == [record.bin_bytes, record.documents * ROW_DTYPE.itemsize] else None


def is_intact(folder: Path, number: int) -> bool:
    """Return True if the shard is complete and its files match the checksums in its record."""
    record = read_shard_record(folder, number)
    if record is None:
        return False
    try:
        checksums = [crc32(folder / f"{number}.{suffix}") for suffix in ("bin", "rows")]
    except OSError:  # for example because of a bad sector
        return False
    return checksums == [record.bin_crc32, record.rows_crc32]


def remove_shard(folder: Path, number: int) -> None:
    """Remove the files of a shard. The record is removed first, so that the shard never looks complete."""
    for suffix in reversed(SUFFIXES):
        (folder / f"{number}.{suffix}").unlink(missing_ok=True)
