"""Writes the .idx file of a corpus in bounded memory. The layout of the file is described in reader.py."""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from megagpt.corpus.crc32 import combine_crc32
from megagpt.corpus.reader import DTYPE_BY_CODE, HEADER, MAGIC, IntArray

_BLOCK = 1 << 16  # number of index entries processed at a time


class IdxWriter:
    """Writer of an .idx file.

    Sequence lengths are written directly to their final offset. Document boundaries come after the sequence offsets in
    the file, and the number of sequences is known only at the end. The boundaries are therefore collected in an unnamed
    temporary file, which disappears even if this process is killed.

    Args:
        path: path of the file.
        dtype: type of the ids in .bin.

    Attributes:
        sequences: number of sequences added so far.
        documents: number of documents added so far.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._dtype = dtype
        self.sequences = 0
        self.documents = 0
        self._crc32 = 0
        # Number of documents at the start of the corpus that have one sequence each. Their boundaries are consecutive
        # integers and need not be collected.
        self._single_sequence_documents = 0
        with ExitStack() as stack:
            self._file: IO[bytes] = stack.enter_context(path.open("wb"))
            self._file.seek(HEADER.size)
            self._boundaries: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            self._files = stack.pop_all()

    def __enter__(self) -> IdxWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, lengths: IntArray, document_ends: IntArray | None) -> None:
        """Append sequences and document boundaries.

        Args:
            lengths: tokens per sequence, `[sequences]`.
            document_ends: for each document that ends, the number of sequences in `lengths` up to the end of the
                document, `[documents]`. If None, each sequence is one document.
        """
        self._write(lengths.astype("<i4", copy=False))
        documents_before = self.documents
        self.documents += len(lengths if document_ends is None else document_ends)
        if document_ends is None and self._single_sequence_documents == documents_before == self.sequences:
            self._single_sequence_documents = self.documents
        else:
            ends = np.arange(1, len(lengths) + 1) if document_ends is None else document_ends
            self._boundaries.write((ends + np.int64(self.sequences)).astype("<i8", copy=False).data)
        self.sequences += len(lengths)

    def finish(self) -> int:
        """Write the offsets, document boundaries and header, and flush the file to disk. Returns the file's CRC-32."""
        self._write_offsets()
        boundaries = self._single_sequence_documents + 1
        for start in range(0, boundaries, _BLOCK):
            self._write(np.arange(start, min(start + _BLOCK, boundaries), dtype="<i8"))
        self._boundaries.seek(0)
        block = np.empty(_BLOCK, "<i8")
        while size := self._boundaries.readinto(block.data):  # type: ignore[attr-defined]
            self._write(block[: size // 8])
        body_bytes = self._file.tell() - HEADER.size
        code = next(code for code, dtype in DTYPE_BY_CODE.items() if dtype == self._dtype)
        header = HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        return combine_crc32(zlib.crc32(header), self._crc32, body_bytes)

    def _write_offsets(self) -> None:
        """Compute the byte offset of each sequence from the written lengths, and write the offsets block by block."""
        self._file.flush()
        lengths = np.empty(_BLOCK, "<i4")
        offsets = np.zeros(_BLOCK + 1, "<i8")
        with self._path.open("rb") as file:
            file.seek(HEADER.size)
            for start in range(0, self.sequences, _BLOCK):
                count = min(_BLOCK, self.sequences - start)
                file.readinto(lengths[:count].data)
                offsets[1 : count + 1] = lengths[:count]
                offsets[1 : count + 1] *= self._dtype.itemsize
                np.cumsum(offsets[: count + 1], out=offsets[: count + 1])
                self._write(offsets[:count])
                offsets[0] = offsets[count]

    def _write(self, entries: IntArray) -> None:
        """Append entries, whose type must be that of the file."""
        content = np.ascontiguousarray(entries).data
        self._file.write(content)
        self._crc32 = zlib.crc32(content, self._crc32)
