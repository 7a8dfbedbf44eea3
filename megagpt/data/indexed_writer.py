"""Writes a corpus as Megatron's .bin/.idx (see indexed.py) with its sidecar, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megagpt.data.checksums import joined
from megagpt.data.id_file import BinWriter, ChecksummedRanges, merge_ranges
from megagpt.data.index_file import IdxWriter
from megagpt.data.indexed import Tokens, corpus_file, token_dtype
from megagpt.data.sidecar import Sidecar
from megagpt.errors import UserError
from megagpt.files import ChecksummedFile

MAX_SEQUENCE = 2**31 - 1  # tokens: lengths are int32


class CorpusWriter:
    """Writes documents one by one; memory does not grow with their number.

    Use it in a `with` block and call `finish` at the end: until then the files have temporary names, and leaving
    the block without it removes them. `dtype` is of the ids in .bin, if not that of the vocabulary's size. Others may
    write ids too, from where `ids` ends on: what they wrote, in order, belongs into `others` before `finish`.
    Raises UserError when the place cannot be written to.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, dtype: np.dtype[Any] | None = None) -> None:
        self.prefix, self.vocab_size, self.dtype = os.fspath(prefix), vocab_size, dtype or token_dtype(vocab_size)
        self.tokens = self.documents = self.text_bytes = 0
        self.other_ranges: ChecksummedRanges = []
        folder = Path(self.prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self.bin_file = stack.enter_context(BinWriter(_partial(self.prefix, ".bin")))
                self._index = stack.enter_context(IdxWriter(_partial(self.prefix, ".idx"), self.dtype))
                self._files = stack.pop_all()
        except OSError as error:
            do = "choose an output prefix in a folder that you may write to"
            what = f"cannot write the corpus: {error.strerror}"
            raise UserError(what, str(error.filename or self.prefix), do) from None

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a full disk, which the error on its way has said
            self._files.close()
        for suffix in (".bin", ".idx", ".json"):
            _partial(self.prefix, suffix).unlink(missing_ok=True)

    def add_document(self, ids: Sequence[int] | Tokens, text_bytes: int) -> None:
        """Append one document of ids (its end-of-document symbol included) that stand for `text_bytes` bytes.

        No ids give what Megatron's preprocess_data writes for an empty document: no sequence, but an entry among
        the documents. Raises UserError for ids outside the vocabulary (numpy would wrap them silently).
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            what = f"token ids {array.min()} to {array.max()} do not fit the vocabulary of {self.vocab_size}"
            do = "give the vocabulary size of the tokenizer that made the ids"
            raise UserError(what, f"{self.prefix}, document {self.documents}", do)
        self.write_ids(array.astype(self.dtype).tobytes())
        self.end_documents(np.array([array.size]), text_bytes)

    def write_ids(self, ids: bytes | memoryview) -> None:
        """Append ids in the type of .bin, which the caller has checked, of documents that `end_documents` ends."""
        self.bin_file.write(ids)

    def end_documents(self, tokens: Tokens, text_bytes: int) -> None:
        """End documents of `tokens` tokens each `[documents]`, which together stand for `text_bytes` bytes."""
        if len(tokens) and 0 < tokens.min() <= tokens.max() <= MAX_SEQUENCE:  # as nearly always
            self.end_sequences(tokens, None, text_bytes)
            return
        counts = -(-tokens.astype(np.int64) // MAX_SEQUENCE)  # sequences of each
        lengths = np.full(counts.sum(), MAX_SEQUENCE, "<i4")
        full = counts > 0
        lengths[np.cumsum(counts)[full] - 1] = (tokens - (counts - 1) * MAX_SEQUENCE)[full]
        self.end_sequences(lengths, np.cumsum(counts), text_bytes)

    def end_sequences(self, lengths: Tokens, document_ends: Tokens | None, text_bytes: int) -> None:
        """End sequences of so many tokens each. `document_ends` counts those up to the end of each document.

        None: each of them is a document.
        """
        self._index.add(lengths, document_ends)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.documents = self._index.documents
        self.text_bytes += text_bytes

    def finish(
        self,
        tokenizer_sha256: str,
        eod: int,
        made: Mapping[str, Any] | None = None,
        packed: int | None = None,
        padding: int = 0,
    ) -> Sidecar:
        """Write the index and the sidecar, and give all three files their names. The facts: see `Sidecar`."""
        stretches = merge_ranges([*self.bin_file.finish(), *self.other_ranges])
        sidecar = Sidecar(
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self.vocab_size,
            eod=eod,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            idx_crc32=self._index.finish(),
            bin_crc32=reduce(lambda crc32, one: joined(crc32, one[1], one[0]), stretches, 0),
            stretches=tuple(stretches),
            made=made or {},
            packed=packed,
            padding=padding,
        )
        with ChecksummedFile(_partial(self.prefix, ".json")) as file:
            file.write(sidecar.to_json().encode())
            file.sync()
        self._publish(".bin", ".json", ".idx")
        return sidecar

    def finish_without_sidecar(self) -> None:
        """Write the index, and give it and .bin their names: a corpus without a sidecar."""
        self.bin_file.finish()
        self._index.finish()
        corpus_file(self.prefix, ".json").unlink(missing_ok=True)
        self._publish(".bin", ".idx")

    def _publish(self, *suffixes: str) -> None:
        # An older corpus goes first and the index comes last: at no time do parts of two corpora form one.
        corpus_file(self.prefix, ".idx").unlink(missing_ok=True)
        for suffix in suffixes:
            _partial(self.prefix, suffix).replace(corpus_file(self.prefix, suffix))


def partial_bin_path(prefix: str) -> Path:
    """Where .bin is until its corpus is whole."""
    return _partial(prefix, ".bin")


def _partial(prefix: str, suffix: str) -> Path:
    return corpus_file(prefix, suffix + ".partial")
