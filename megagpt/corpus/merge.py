"""The command `megagpt data merge`, which concatenates several corpora into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagpt import __version__
from megagpt.corpus.metadata import check_same_tokenizer
from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import MachineError, UserError

_TOKENS = 1 << 20  # number of tokens copied at a time
_ENTRIES = 1 << 20  # number of index entries copied at a time


@dataclass(frozen=True)
class MergeResult:
    """Result of merging corpora.

    Attributes:
        prefix: prefix of the merged corpus.
        documents: number of documents.
        tokens: number of tokens.
        verified: whether the merged corpus has a sidecar. It has one only if all inputs have one.
        packed: seq_len of a packed corpus, or None if the corpus is not packed.
    """

    prefix: str
    documents: int
    tokens: int
    verified: bool
    packed: int | None = None

    def __str__(self) -> str:
        kind = "samples" if self.packed else "documents"
        line = f"{self.prefix}: {self.documents:,} {kind}, {self.tokens:,} tokens"
        return line if self.verified else line + "\nwritten without a sidecar, since not all inputs have one"


def merge(prefixes: Sequence[str], output: str) -> MergeResult:
    """Concatenate corpora, in the given order, into a new corpus.

    Args:
        prefixes: prefixes of the corpora to merge.
        output: prefix of the new corpus.

    Returns:
        A summary of the new corpus.

    Raises:
        UserError: the corpora are not compatible, or the output is one of the inputs.
        MachineError: writing failed.
    """
    readers = [CorpusReader(prefix) for prefix in prefixes]
    if os.path.realpath(f"{output}.idx") in (os.path.realpath(f"{prefix}.idx") for prefix in prefixes):
        raise UserError("a corpus cannot be merged into itself", output, "choose another --output")
    for reader in readers:
        _check_compatible(readers[0], reader)
    sidecars = [reader.sidecar for reader in readers if reader.sidecar]
    first = sidecars[0] if len(sidecars) == len(readers) else None
    try:
        with CorpusWriter(output, first.vocab_size if first else 0, readers[0].dtype) as writer:
            for reader in readers:
                _copy(reader, writer)
            if first:
                made = {"by": f"megagpt {__version__}", "merged": list(prefixes)}
                padding = sum(sidecar.padding for sidecar in sidecars)
                writer.finish(first.tokenizer_sha256, first.eod, made, first.packed, padding)
            else:
                writer.finish_without_sidecar()
    except OSError as error:
        do = "free some disk space, or choose another --output"
        raise MachineError(f"cannot write: {error.strerror}", str(error.filename or output), do) from None
    return MergeResult(output, writer.documents, writer.tokens, first is not None, readers[0].packed)


def _check_compatible(one: CorpusReader, other: CorpusReader) -> None:
    """Raise UserError if two corpora cannot be merged."""
    if one.dtype != other.dtype:
        what = f"the ids have different types ({one.dtype.name} and {other.dtype.name})"
        raise UserError(what, f"{one.prefix}\n{other.prefix}", "prepare both with one tokenizer")
    if other.sidecar:
        check_same_tokenizer(one.prefix, one.sidecar, other.prefix, other.sidecar.tokenizer_sha256)
    if one.packed != other.packed:
        packing = [f"packed for seq_len {reader.packed}" if reader.packed else "not packed" for reader in (one, other)]
        what = f"one corpus is {packing[0]}, the other {packing[1]}"
        do = "prepare both in the same way, or list both under data.train"
        raise UserError(what, f"{one.prefix}\n{other.prefix}", do)


def _copy(reader: CorpusReader, writer: CorpusWriter) -> None:
    total = len(reader.tokens)
    for start in range(0, total, _TOKENS):
        writer.write_ids(reader.read_range(start, min(_TOKENS, total - start)))
    # The sequences of a document may be in different blocks, so all sequences are added before the ends of documents.
    for start in range(0, len(reader), _ENTRIES):
        writer.end_sequences(reader.lengths[start : start + _ENTRIES], np.array([], np.int64), 0)
    for start in range(1, len(reader.documents), _ENTRIES):
        ends = reader.documents[start : start + _ENTRIES] - len(reader)
        writer.end_sequences(np.array([], np.int64), ends, 0)
    writer.text_bytes += reader.sidecar.text_bytes if reader.sidecar else 0
