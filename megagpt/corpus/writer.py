"""Writes a corpus in Megatron's indexed format (.bin and .idx) with its sidecar.

An incomplete corpus never has the final file names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megagpt.corpus.bin_writer import BinWriter, ChecksummedRanges, merge_ranges
from megagpt.corpus.crc32 import combine_crc32
from megagpt.corpus.idx_writer import IdxWriter
from megagpt.corpus.metadata import Sidecar
from megagpt.corpus.reader import IntArray, corpus_file
from megagpt.errors import UserError
from megagpt.files import ChecksummedFile
from megagpt.tokenizer.id_dtype import token_dtype

MAX_SEQUENCE = 2**31 - 1  # maximum tokens per sequence, because .idx stores lengths as int32


class CorpusWriter:
    """Writes a corpus document by document. Memory does not grow with the number of documents.

    Use it in a `with` block and call `finish` at the end. Until then the files have temporary names, and leaving the
    block without calling `finish` removes them.

    Several processes may write ids to one .bin file. The ids of the other processes come after the ids of this writer.
    Before `finish` is called, `other_ranges` must be set to the ranges that the other processes wrote, in file order.

    Args:
        prefix: path of the corpus without a suffix.
        vocab_size: number of ids in the tokenizer's vocabulary.
        dtype: type of the ids in .bin. If None, it is chosen according to the size of the vocabulary.

    Attributes:
        tokens: number of tokens written so far.
        documents: number of documents written so far.
        text_bytes: size in UTF-8 bytes of the text written so far.
        bin_file: writer of .bin.
        other_ranges: ranges of .bin that other processes wrote.

    Raises:
        UserError: the files cannot be created.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, dtype: np.dtype[Any] | None = None) -> None:
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype or token_dtype(vocab_size)
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self.other_ranges: ChecksummedRanges = []
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self.bin_file = stack.enter_context(BinWriter(_partial_path(self.prefix, ".bin")))
                self._idx_file = stack.enter_context(IdxWriter(_partial_path(self.prefix, ".idx"), self.dtype))
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
        with suppress(OSError):  # if the disk is full, the write has already raised an error
            self._files.close()
        for suffix in (".bin", ".idx", ".json"):
            _partial_path(self.prefix, suffix).unlink(missing_ok=True)

    def add_document(self, ids: Sequence[int] | IntArray, text_bytes: int) -> None:
        """Append one document.

        As in Megatron's preprocess_data, a document without ids has a document boundary but no sequence.

        Args:
            ids: token ids, including the end-of-document token.
            text_bytes: size of the document's text in bytes of UTF-8.

        Raises:
            UserError: an id is outside the vocabulary. Without this check, numpy would silently wrap it around.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            what = f"token ids {array.min()} to {array.max()} do not fit the vocabulary of {self.vocab_size}"
            do = "give the vocabulary size of the tokenizer that made the ids"
            raise UserError(what, f"{self.prefix}, document {self.documents}", do)
        self.write_ids(array.astype(self.dtype).tobytes())
        self.end_documents(np.array([array.size]), text_bytes)

    def write_ids(self, ids: bytes | memoryview) -> None:
        """Append ids, given as the bytes of .bin, without checking them.

        Afterwards `end_documents` or `end_sequences` must be called for these ids.
        """
        self.bin_file.write(ids)

    def end_documents(self, tokens: IntArray, text_bytes: int) -> None:
        """End documents whose ids have been written.

        Documents of more than 2^31 - 1 tokens are divided into several sequences.

        Args:
            tokens: tokens per document, `[documents]`.
            text_bytes: total size of the texts of these documents in bytes of UTF-8.
        """
        if len(tokens) and 0 < tokens.min() <= tokens.max() <= MAX_SEQUENCE:  # the common case
            self.end_sequences(tokens, None, text_bytes)
            return
        sequences = -(-tokens.astype(np.int64) // MAX_SEQUENCE)  # number of sequences per document
        document_ends = np.cumsum(sequences)
        lengths = np.full(sequences.sum(), MAX_SEQUENCE, "<i4")
        has_tokens = sequences > 0
        last_lengths = tokens - (sequences - 1) * MAX_SEQUENCE
        lengths[document_ends[has_tokens] - 1] = last_lengths[has_tokens]
        self.end_sequences(lengths, document_ends, text_bytes)

    def end_sequences(self, lengths: IntArray, document_ends: IntArray | None, text_bytes: int) -> None:
        """End sequences whose ids have been written, and the documents that they complete.

        Args:
            lengths: tokens per sequence, `[sequences]`.
            document_ends: for each document that ends, the number of sequences in `lengths` up to the end of the
                document, `[documents]`. If None, each sequence is one document.
            text_bytes: total size of the texts of these documents in bytes of UTF-8.
        """
        self._idx_file.add(lengths, document_ends)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.documents = self._idx_file.documents
        self.text_bytes += text_bytes

    def finish(
        self,
        tokenizer_sha256: str,
        eod: int,
        made: Mapping[str, Any] | None = None,
        packed: int | None = None,
        padding: int = 0,
    ) -> Sidecar:
        """Write the index and the sidecar, and rename all three files to their final names. Returns the sidecar.

        The arguments are described under the attributes of `Sidecar`.
        """
        ranges = merge_ranges([*self.bin_file.finish(), *self.other_ranges])
        bin_crc32 = 0
        for size, crc32 in ranges:
            bin_crc32 = combine_crc32(bin_crc32, crc32, size)
        sidecar = Sidecar(
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self.vocab_size,
            eod=eod,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            idx_crc32=self._idx_file.finish(),
            bin_crc32=bin_crc32,
            bin_ranges=tuple(ranges),
            made=made or {},
            packed=packed,
            padding=padding,
        )
        with ChecksummedFile(_partial_path(self.prefix, ".json")) as file:
            file.write(sidecar.to_json().encode())
            file.sync()
        self._publish(".bin", ".json", ".idx")
        return sidecar

    def finish_without_sidecar(self) -> None:
        """Write the index, and rename .idx and .bin to their final names."""
        self.bin_file.finish()
        self._idx_file.finish()
        corpus_file(self.prefix, ".json").unlink(missing_ok=True)
        self._publish(".bin", ".idx")

    def _publish(self, *suffixes: str) -> None:
        # The index of an older corpus is removed first, and the new index is renamed last. A mix of files from both
        # corpora can therefore never be mistaken for a corpus.
        corpus_file(self.prefix, ".idx").unlink(missing_ok=True)
        for suffix in suffixes:
            _partial_path(self.prefix, suffix).replace(corpus_file(self.prefix, suffix))


def partial_bin_path(prefix: str) -> Path:
    """Return the temporary path of .bin, which it has until the corpus is finished."""
    return _partial_path(prefix, ".bin")


def _partial_path(prefix: str, suffix: str) -> Path:
    return corpus_file(prefix, suffix + ".partial")
