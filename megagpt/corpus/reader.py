"""Reads a tokenized corpus in Megatron's indexed format (.bin and .idx) through memory maps.

`PREFIX.bin` holds all token ids one after the other, little-endian, without a header. `PREFIX.idx` holds the following
values, little-endian and without padding:

    header                34 bytes: magic, version, dtype code, number of sequences N, number of document boundaries M
    sequence lengths      N × int32, in tokens
    sequence offsets      N × int64, in bytes of .bin
    document boundaries   M × int64: the index of each document's first sequence, followed by N (M = documents + 1)
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.metadata import read_sidecar
from megagpt.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M
DTYPE_BY_CODE: dict[int, np.dtype[Any]] = {
    code: np.dtype(kind) for code, kind in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_PROBES = 64  # maximum number of ranges in the probe of a corpus
_PROBE_TOKENS = 1024  # number of tokens per range in the probe
IntArray = npt.NDArray[np.integer[Any]]


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path of one file of a corpus.

    Args:
        prefix: path of the corpus without a suffix. The suffix is appended even if the name contains a dot.
        suffix: suffix of the file, one of `.bin`, `.idx` and `.json`.
    """
    return Path(os.fspath(prefix) + suffix)


class CorpusChanged(OSError):
    """Error for a corpus that has changed since it was opened.

    This is not a UserError, because the file may be available again when the command is restarted.
    """


class CorpusReader:
    """Memory-mapped corpus. Nothing is copied, and the time to open it does not depend on its size.

    If a mapped file is truncated, reading the missing pages kills the process (SIGBUS). Long-running code therefore
    reads with `read_range`. The arrays keep the memory map alive and remain valid after the reader has been deleted.

    Attributes:
        tokens: all token ids, `[tokens]`.
        lengths: tokens per sequence, `[sequences]`.
        offsets: byte offset of each sequence in .bin, `[sequences]`.
        documents: index of each document's first sequence, `[documents + 1]`.
        dtype: type of the ids.
        fd: file descriptor of .bin.
        sidecar: metadata of the corpus, or None if it has no sidecar file.
        packed: seq_len of a packed corpus, or None if the corpus is not packed.

    Raises:
        UserError: a file is missing, has the wrong format, or does not match the other files of the corpus.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._idx_path = corpus_file(prefix, ".idx")
        self._bin_path = corpus_file(prefix, ".bin")
        index = _map(self._idx_path)
        self.dtype, sequences, boundaries = self._parse_header(index)
        start = HEADER.size
        self.lengths: IntArray = np.frombuffer(index, "<i4", sequences, start)
        self.offsets: IntArray = np.frombuffer(index, "<i8", sequences, start + 4 * sequences)
        self.documents: IntArray = np.frombuffer(index, "<i8", boundaries, start + 12 * sequences)
        mapped = _map(self._bin_path)
        self.fd = os.open(self._bin_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)
        self._size_and_mtime = self._stat()
        self._check_sizes(len(mapped))
        self.tokens: IntArray = np.frombuffer(mapped, self.dtype)
        self.sidecar = read_sidecar(corpus_file(prefix, ".json"))
        self.packed = self.sidecar.packed if self.sidecar else None
        self._check_sidecar()

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    def sequence(self, index: int) -> IntArray:
        """Return the ids of one sequence `[length]`, as a view of the memory map."""
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def document(self, index: int) -> IntArray:
        """Return the ids of all sequences of one document `[length]`, as a view of the memory map."""
        first, end = int(self.documents[index]), int(self.documents[index + 1])
        if first == end:
            return self.tokens[:0]
        start = int(self.offsets[first]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[first:end].sum(dtype=np.int64))]

    def document_starts(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the token offsets at which the documents with these indices start.

        The number of documents is also a valid index. Its offset is the end of the corpus.
        """
        first_sequence = self.documents[indices]
        has_tokens = first_sequence < len(self)
        starts = np.full(len(first_sequence), len(self.tokens), np.int64)
        starts[has_tokens] = self.offsets[first_sequence[has_tokens]] // self.dtype.itemsize
        return starts

    def read_range(self, start: int, count: int) -> bytes:
        """Read consecutive tokens directly from the .bin file, without the memory map.

        Args:
            start: index of the first token.
            count: number of tokens.

        Returns:
            The ids as the bytes of .bin.

        Raises:
            CorpusChanged: the file no longer contains these tokens, or can no longer be read.
        """
        size, offset = count * self.dtype.itemsize, start * self.dtype.itemsize
        try:
            content = os.pread(self.fd, size, offset)
        except OSError as error:
            raise self._changed_error(f"can no longer be read: {error.strerror}") from None
        if len(content) != size:
            self.check_unchanged()
            raise self._changed_error("was truncated")
        return content

    @cached_property
    def probe(self) -> IntArray:
        """Ids of 64 ranges, spread evenly over the corpus and including its start and end.

        For a small corpus there are fewer ranges, which cover all of its ids.
        """
        return self._read_probe()

    def check_unchanged(self) -> None:
        """Raise CorpusChanged if .bin has changed since it was opened.

        The check compares the size of the file and, if the modification time has changed, the probe. It does not detect
        that the file was replaced or removed, because the original file is still open.
        """
        stat = self._stat()
        if stat == self._size_and_mtime:
            return
        if stat[0] != self._size_and_mtime[0]:
            raise self._changed_error(f"had {self._size_and_mtime[0]:,} bytes, now has {stat[0]:,}")
        if not np.array_equal(self._read_probe(), self.probe):
            raise self._changed_error("was overwritten")
        self._size_and_mtime = stat  # only the modification time has changed

    def _read_probe(self) -> IntArray:
        count = min(_PROBE_TOKENS, len(self.tokens))
        ranges = min(_PROBES, -(-len(self.tokens) // _PROBE_TOKENS))
        starts = np.linspace(0, len(self.tokens) - count, ranges).astype(np.int64).tolist()
        return np.frombuffer(b"".join(self.read_range(start, count) for start in starts), self.dtype)

    def _stat(self) -> tuple[int, int]:
        """Return the size (bytes) and modification time (ns) of .bin."""
        try:
            stat = os.fstat(self.fd)
        except OSError as error:
            raise self._changed_error(f"can no longer be read: {error.strerror}") from None
        return stat.st_size, stat.st_mtime_ns

    def _changed_error(self, what: str) -> CorpusChanged:
        return CorpusChanged(
            f"{self._bin_path} has changed while it was in use: it {what}. Restore it and run the same command again; "
            "training resumes from its last checkpoint"
        )

    def _parse_header(self, index: bytes | mmap.mmap) -> tuple[np.dtype[Any], int, int]:
        """Return the type of the ids, the number of sequences and the number of document boundaries."""
        if index[:8] == b"TNTIDX\0\0":
            raise self._index_error("fairseq's older index format (TNTIDX) is not supported")
        if len(index) < HEADER.size or index[:9] != MAGIC:
            raise self._index_error("not an index in Megatron's format")
        _, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size])
        if version != 1:
            raise self._index_error(f"index version {version} is not supported, only version 1")
        if code not in DTYPE_BY_CODE:
            kind = "floating-point numbers, not token ids" if code in (6, 7) else f"an unknown type (code {code})"
            raise self._index_error(f"the corpus holds {kind}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) == expected + sequences and sequences:
            raise self._index_error("this is a multimodal corpus (the index has a mode per sequence), not text")
        if len(index) != expected:
            raise self._index_error(f"the index has {len(index):,} bytes, but its header implies {expected:,}")
        return DTYPE_BY_CODE[code], sequences, boundaries

    def _check_sizes(self, bin_bytes: int) -> None:
        """Raise UserError if the last entries of the index contradict its header or the size of .bin."""
        if len(self.documents) == 0 or self.documents[-1] != len(self):
            raise self._index_error("the last document of the index does not end with its last sequence")
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self) else 0
        if expected != bin_bytes:
            what = f"the index describes {expected:,} bytes of tokens, but the file has {bin_bytes:,}"
            do = "copy or prepare the corpus again: the file was truncated or changed"
            raise UserError(what, str(self._bin_path), do)

    def _check_sidecar(self) -> None:
        sidecar = self.sidecar
        if sidecar is None:
            return
        path = str(corpus_file(self.prefix, ".json"))
        documents = len(self.documents) - 1
        if (sidecar.tokens, sidecar.documents) != (len(self.tokens), documents):
            what = (
                f"the sidecar describes {sidecar.tokens:,} tokens in {sidecar.documents:,} documents, "
                f"but the corpus has {len(self.tokens):,} in {documents:,}"
            )
            do = "prepare the corpus again, or remove the sidecar to use the corpus unverified"
            raise UserError(what, path, do)
        if self.packed and len(self.tokens) != len(self) * (self.packed + 1):
            what = f"the sidecar describes samples of {self.packed + 1:,} tokens, but those of the corpus differ"
            raise UserError(what, path, "prepare the corpus again")

    def _index_error(self, what: str) -> UserError:
        return UserError(what, str(self._idx_path), "create the corpus with `megagpt prepare`, or copy it again")


def _map(path: Path) -> bytes | mmap.mmap:
    """Map a file into memory, read-only. For an empty file, which cannot be mapped, return b""."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        do = "give the prefix of a prepared corpus (its path without .bin or .idx); create one with `megagpt prepare`"
        raise UserError(f"cannot open the corpus: {error.strerror}", str(path), do) from None
