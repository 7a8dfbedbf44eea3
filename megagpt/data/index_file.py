"""Writes .idx (see indexed.py for its layout) in bounded memory."""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from megagpt.data.checksums import joined
from megagpt.data.indexed import CODES, HEADER, MAGIC, Tokens

_BLOCK = 1 << 16  # entries worked on at a time


class IdxWriter:
    """An .idx that grows: `sequences` and `documents` are counted.

    Lengths are written where they belong. The ends of documents come after all offsets, whose number is known last:
    until then they are in a file without a name, which vanishes even if this process is killed.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self.sequences = self.documents = self._crc32 = 0
        self._plain = 0  # documents at the head with one sequence each, whose ends need not be kept
        with ExitStack() as stack:
            self._file: IO[bytes] = stack.enter_context(path.open("wb"))
            self._file.seek(HEADER.size)
            self._ends: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            self._files = stack.pop_all()

    def __enter__(self) -> IdxWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, lengths: Tokens, document_ends: Tokens | None) -> None:
        """Append sequences of so many tokens each, and documents that end with so many of these; None: one each."""
        self._write(lengths.astype("<i4", copy=False))
        before = self.documents
        self.documents += len(lengths if document_ends is None else document_ends)
        if document_ends is None and self._plain == before == self.sequences:
            self._plain = self.documents
        else:
            ends = np.arange(1, len(lengths) + 1) if document_ends is None else document_ends
            self._ends.write((ends + np.int64(self.sequences)).astype("<i8", copy=False).data)
        self.sequences += len(lengths)

    def finish(self) -> int:
        """Write what is missing and have it all on the disk; its CRC-32."""
        self._write_offsets()
        for at in range(0, self._plain + 1, _BLOCK):
            self._write(np.arange(at, min(at + _BLOCK, self._plain + 1), dtype="<i8"))
        self._ends.seek(0)
        ends = np.empty(_BLOCK, "<i8")
        while size := self._ends.readinto(ends.data):  # type: ignore[attr-defined]
            self._write(ends[: size // 8])
        size = self._file.tell() - HEADER.size
        code = next(code for code, kind in CODES.items() if kind == self._dtype)
        header = HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        return joined(zlib.crc32(header), self._crc32, size)

    def _write_offsets(self) -> None:
        self._file.flush()
        lengths, offsets = np.empty(_BLOCK, "<i4"), np.zeros(_BLOCK + 1, "<i8")
        with self._path.open("rb") as file:
            file.seek(HEADER.size)
            for at in range(0, self.sequences, _BLOCK):
                count = min(_BLOCK, self.sequences - at)
                file.readinto(lengths[:count].data)
                offsets[1 : count + 1] = lengths[:count]
                offsets[1 : count + 1] *= self._dtype.itemsize
                np.cumsum(offsets[: count + 1], out=offsets[: count + 1])
                self._write(offsets[:count])
                offsets[0] = offsets[count]

    def _write(self, numbers: Tokens) -> None:
        """Append numbers of the right type."""
        content = np.ascontiguousarray(numbers).data
        self._file.write(content)
        self._crc32 = zlib.crc32(content, self._crc32)
