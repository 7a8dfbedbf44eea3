"""Several corpora to one, one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagpt import __version__
from megagpt.data.indexed import CorpusReader
from megagpt.data.indexed_writer import CorpusWriter
from megagpt.data.sidecar import check_same_tokenizer
from megagpt.errors import MachineError, UserError

_TOKENS, _ENTRIES = 1 << 20, 1 << 20  # copied at a time


@dataclass(frozen=True)
class Merged:
    """What was written. `verified` is false where a corpus without a sidecar made it one without."""

    prefix: str
    documents: int
    tokens: int
    verified: bool
    packed: int | None = None

    def __str__(self) -> str:
        kind = "samples" if self.packed else "documents"
        line = f"{self.prefix}: {self.documents:,} {kind}, {self.tokens:,} tokens"
        return line if self.verified else line + "\nno sidecar: not all of the corpora have one"


def merge(prefixes: Sequence[str], output: str) -> Merged:
    """Write the documents of all corpora as one, in the order given. Raises UserError where they do not go together."""
    readers = [CorpusReader(prefix) for prefix in prefixes]
    if os.path.realpath(f"{output}.idx") in (os.path.realpath(f"{prefix}.idx") for prefix in prefixes):
        raise UserError("a corpus cannot be merged into itself", output, "choose another --output")
    for reader in readers:
        _check_alike(readers[0], reader)
    sidecars = [reader.sidecar for reader in readers if reader.sidecar]
    facts = sidecars[0] if len(sidecars) == len(readers) else None
    try:
        with CorpusWriter(output, facts.vocab_size if facts else 0, readers[0].dtype) as writer:
            for reader in readers:
                _copy(reader, writer)
            if facts:
                made = {"by": f"megagpt {__version__}", "merged": list(prefixes)}
                padding = sum(one.padding for one in sidecars)
                writer.finish(facts.tokenizer_sha256, facts.eod, made, facts.packed, padding)
            else:
                writer.finish_without_sidecar()
    except OSError as error:
        do = "make room, or choose another --output"
        raise MachineError(f"cannot write: {error.strerror}", str(error.filename or output), do) from None
    return Merged(output, writer.documents, writer.tokens, facts is not None, readers[0].packed)


def _check_alike(one: CorpusReader, other: CorpusReader) -> None:
    """Raise UserError where two corpora cannot be one."""
    if one.dtype != other.dtype:
        what = f"the ids are of different types ({one.dtype.name} and {other.dtype.name})"
        raise UserError(what, f"{one.prefix}\n{other.prefix}", "prepare both with one tokenizer")
    if other.sidecar:
        check_same_tokenizer(one.prefix, one.sidecar, other.prefix, other.sidecar.tokenizer_sha256)
    if one.packed != other.packed:
        cuts = [f"packed for seq_len {reader.packed}" if reader.packed else "not packed" for reader in (one, other)]
        what = f"one corpus is {cuts[0]}, the other {cuts[1]}"
        raise UserError(what, f"{one.prefix}\n{other.prefix}", "prepare both alike, or list both under data.train")


def _copy(reader: CorpusReader, writer: CorpusWriter) -> None:
    total = len(reader.tokens)
    for start in range(0, total, _TOKENS):
        writer.write_ids(reader.read_range(start, min(_TOKENS, total - start)))
    # Sequences that end with a block of them may belong to a document of the next: documents come after all.
    for at in range(0, len(reader), _ENTRIES):
        writer.end_sequences(reader.lengths[at : at + _ENTRIES], np.array([], np.int64), 0)
    for at in range(1, len(reader.documents), _ENTRIES):
        ends = reader.documents[at : at + _ENTRIES] - len(reader)
        writer.end_sequences(np.array([], np.int64), ends, 0)
    writer.text_bytes += reader.sidecar.text_bytes if reader.sidecar else 0
