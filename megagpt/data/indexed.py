"""Megatron's .bin/.idx: a corpus as token ids in one file, and where its documents lie in another.

`.bin` holds the ids back to back, little-endian, without a header. `.idx` holds, little-endian and unpadded:
magic, version, code of the id type, N sequences, M = documents + 1, then N int32 lengths (tokens), N int64
offsets (bytes in .bin) and M int64 sequence numbers where documents begin, the last one being N.
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

from megagpt.data.sidecar import read_sidecar
from megagpt.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code, N, M: 34 bytes
CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(kind) for code, kind in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_PROBES, _PROBE_TOKENS = 64, 1024  # places looked at in a corpus, and tokens at each
Tokens = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of the ids in .bin: uint16 below a vocabulary of 65,500, else int32, as Megatron and its kin have it."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """PREFIX with `.bin`, `.idx` or `.json` behind it (a dot in PREFIX is no ending)."""
    return Path(os.fspath(prefix) + suffix)


class CorpusChanged(OSError):
    """A corpus is no longer what was opened. No mistake of the command: it may go well on the next start."""


class CorpusReader:
    """A corpus opened by memory map; nothing is copied, and opening costs the same at any size.

    `tokens` is all of .bin `[tokens]`; `lengths` (tokens) and `offsets` (bytes) are `[sequences]`, `documents`
    is `[documents + 1]`. The arrays hold the map themselves: they stay valid when the reader is gone. A file that is
    cut short under a map kills the process that reads there: what runs for long reads by `stretch`.
    `file` is the descriptor of .bin. `sidecar` is None for files that come without one; `packed` is the seq_len of
    packed samples, None for other corpora. Raises UserError where the files do not fit together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._idx, self._bin = corpus_file(prefix, ".idx"), corpus_file(prefix, ".bin")
        index = _map(self._idx)
        self.dtype, sequences, documents = self._header(index)
        at = HEADER.size
        self.lengths: Tokens = np.frombuffer(index, "<i4", sequences, at)
        self.offsets: Tokens = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self.documents: Tokens = np.frombuffer(index, "<i8", documents, at + 12 * sequences)
        self._bytes = _map(self._bin)
        self.file = os.open(self._bin, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self._stamp = self._stat()
        self._check_sizes()
        self.tokens: Tokens = np.frombuffer(self._bytes, self.dtype)
        self.sidecar = read_sidecar(corpus_file(prefix, ".json"))
        self.packed = self.sidecar.packed if self.sidecar else None
        self._check_sidecar()

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, number: int) -> Tokens:
        """Ids of one sequence `[length]`, a view of the map."""
        start = int(self.offsets[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])]

    def document(self, number: int) -> Tokens:
        """Ids of one document `[length]`, its sequences joined: a view of the map."""
        first, end = int(self.documents[number]), int(self.documents[number + 1])
        if first == end:
            return self.tokens[:0]
        start = int(self.offsets[first]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[first:end].sum(dtype=np.int64))]

    def document_starts(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where these documents begin, in tokens; one past the last begins where the corpus ends."""
        first = self.documents[numbers]
        there = first < len(self)
        starts = np.full(len(first), len(self.tokens), np.int64)
        starts[there] = self.offsets[first[there]] // self.dtype.itemsize
        return starts

    def read_range(self, start: int, count: int) -> bytes:
        """The bytes of `count` tokens from token `start` on, read from the file as it is now.

        Raises CorpusChanged where they are no longer there.
        """
        size, offset = count * self.dtype.itemsize, start * self.dtype.itemsize
        try:
            content = os.pread(self.file, size, offset)
        except OSError as error:
            raise self._gone(f"can no longer be read: {error.strerror}") from None
        if len(content) != size:
            self.check_unchanged()
            raise self._gone("has become shorter")
        return content

    @cached_property
    def probe(self) -> Tokens:
        """Ids at 64 places spread evenly over the corpus, its first and last among them; all, if it is small."""
        return self._probe()

    def check_unchanged(self) -> None:
        """Raise CorpusChanged if .bin is no longer as it was opened: its size, or its `probe` where it was written to.

        A file that was replaced or removed is still open here, and as good as before.
        """
        if (stamp := self._stat()) == self._stamp:
            return
        if stamp[0] != self._stamp[0]:
            raise self._gone(f"had {self._stamp[0]:,} bytes, and has {stamp[0]:,} now")
        if not np.array_equal(self._probe(), self.probe):
            raise self._gone("has been written to")
        self._stamp = stamp  # it was only touched

    def _probe(self) -> Tokens:
        count = min(_PROBE_TOKENS, len(self.tokens))
        places = _PROBES if len(self.tokens) > _PROBES * _PROBE_TOKENS else -(-len(self.tokens) // _PROBE_TOKENS)
        starts = np.linspace(0, len(self.tokens) - count, places).astype(np.int64).tolist()
        return np.frombuffer(b"".join(self.read_range(start, count) for start in starts), self.dtype)

    def _stat(self) -> tuple[int, int]:
        """Size in bytes, and when .bin was last written to."""
        try:
            facts = os.fstat(self.file)
        except OSError as error:
            raise self._gone(f"can no longer be read: {error.strerror}") from None
        return facts.st_size, facts.st_mtime_ns

    def _gone(self, what: str) -> CorpusChanged:
        return CorpusChanged(
            f"{self._bin} has changed while it was read: it {what}. Restore it and start the same command again: "
            "a run goes on from its last checkpoint"
        )

    def _header(self, index: bytes | mmap.mmap) -> tuple[np.dtype[Any], int, int]:
        if index[:8] == b"TNTIDX\0\0":
            raise self._error("fairseq's older index format (TNTIDX) is not read")
        if len(index) < HEADER.size or index[:9] != MAGIC:
            raise self._error("not an index of Megatron's format")
        _, version, code, sequences, documents = HEADER.unpack(index[: HEADER.size])
        if version != 1:
            raise self._error(f"index version {version} is not known, only 1")
        if code not in CODES:
            kind = "floating-point numbers, not token ids" if code in (6, 7) else f"an unknown type (code {code})"
            raise self._error(f"the corpus holds {kind}")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if len(index) == expected + sequences and sequences:
            raise self._error("a multimodal corpus (it has a mode for each sequence) is not text")
        if len(index) != expected:
            raise self._error(f"the index has {len(index):,} bytes where its header asks for {expected:,}")
        return CODES[code], sequences, documents

    def _check_sizes(self) -> None:
        """Compare what the index says last with its counts and with the size of .bin."""
        if len(self.documents) == 0 or self.documents[-1] != len(self):
            raise self._error("the documents of the index do not end with its last sequence")
        last = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self) else 0
        if last != len(self._bytes):
            what = f"the index asks for {last:,} bytes of tokens, the file holds {len(self._bytes):,}"
            raise UserError(what, str(self._bin), "copy or prepare the corpus again: it was cut short or changed")

    def _check_sidecar(self) -> None:
        facts = self.sidecar
        if facts and (facts.tokens, facts.documents) != (len(self.tokens), len(self.documents) - 1):
            what = (
                f"the sidecar speaks of {facts.tokens:,} tokens in {facts.documents:,} documents, "
                f"the corpus holds {len(self.tokens):,} in {len(self.documents) - 1:,}"
            )
            do = "prepare the corpus again, or remove the sidecar to use the corpus unverified"
            raise UserError(what, str(corpus_file(self.prefix, ".json")), do)
        if self.packed and len(self.tokens) != len(self) * (self.packed + 1):
            what = f"the sidecar speaks of samples of {self.packed + 1:,} tokens, the corpus has others"
            raise UserError(what, str(corpus_file(self.prefix, ".json")), "prepare the corpus again")

    def _error(self, what: str) -> UserError:
        return UserError(what, str(self._idx), "make the corpus with `megagpt prepare`, or copy it again")


def _map(path: Path) -> bytes | mmap.mmap:
    """The file as a read-only map; an empty file, which cannot be mapped, as no bytes."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        do = "give the prefix of a prepared corpus (its path without .bin or .idx); `megagpt prepare` makes one"
        raise UserError(f"cannot open the corpus: {error.strerror}", str(path), do) from None
