"""The command `megagpt data inspect`, which shows statistics of a corpus and some of its documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.corpus.metadata import check_same_tokenizer
from megagpt.corpus.reader import CorpusReader
from megagpt.errors import UserError, without_controls
from megagpt.tokenizer.tokenizer import Tokenizer

_MAX_LENGTHS = 1_000_000  # maximum number of documents in the length statistics, spread evenly over the corpus
_MAX_IDS = 1_000  # maximum number of ids shown per document


@dataclass(frozen=True)
class DocumentExcerpt:
    """Beginning of a document or packed sample.

    Attributes:
        number: index of the document or sample.
        tokens: number of tokens in the whole document or sample.
        ids: first ids of the document or sample.
        text: text of these ids, or None without a tokenizer.
        kind: `document` or `sample`.
    """

    number: int
    tokens: int
    ids: tuple[int, ...]
    text: str | None
    kind: str = "document"

    def __str__(self) -> str:
        content = without_controls(self.text) if self.text is not None else " ".join(map(str, self.ids))
        ellipsis = " …" if self.tokens > len(self.ids) else ""
        return f"{self.kind} {self.number:,}: {self.tokens:,} tokens\n{content}{ellipsis}"


@dataclass(frozen=True)
class Inspection:
    """Statistics of a corpus.

    Attributes:
        prefix: prefix of the corpus.
        id_type: type of the ids in .bin.
        documents: number of documents.
        sequences: number of sequences.
        tokens: number of tokens.
        lengths: quantiles of the number of tokens per document, by name.
        verified_by: first characters of the tokenizer's hash, or None if the corpus has no sidecar.
        packed: seq_len of a packed corpus, or None if the corpus is not packed.
        padding: number of padding tokens in a packed corpus.
        made: description in the sidecar of how the corpus was made.
        shown: excerpts of documents.
    """

    prefix: str
    id_type: str
    documents: int
    sequences: int
    tokens: int
    lengths: Mapping[str, int]
    verified_by: str | None
    packed: int | None = None
    padding: int = 0
    made: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[DocumentExcerpt, ...] = ()

    def __str__(self) -> str:
        sidecar = f"tokenizer {self.verified_by}" if self.verified_by else "no sidecar: unverified"
        if self.packed:
            contents = f"{self.sequences:,} samples, packed for seq_len {self.packed:,}"
            statistics = f"padding: {self.padding / self.tokens:.2%}"
        else:
            contents = f"{self.documents:,} documents, {self.sequences:,} sequences"
            quantiles = ", ".join(f"{name} {tokens:,}" for name, tokens in self.lengths.items())
            statistics = f"tokens per document: {quantiles}"
        lines = [
            f"{self.prefix}: {contents}, {self.tokens:,} tokens ({self.id_type}), {sidecar}",
            statistics,
            *(f"{name}: {value}" for name, value in self.made.items()),
            *map(str, self.shown),
        ]
        return "\n".join(lines)


def inspect(prefix: str, documents: Sequence[int] = (), sample: int = 0, tokenizer: Path | None = None) -> Inspection:
    """Collect statistics and excerpts of a corpus.

    Args:
        prefix: prefix of the corpus.
        documents: indices of documents to show.
        sample: number of further documents to show, spread evenly over the corpus.
        tokenizer: path of the tokenizer with which documents are shown as text. If None, their ids are shown.

    Returns:
        The statistics and excerpts.

    Raises:
        UserError: the corpus cannot be opened, lacks one of the documents, or was made with another tokenizer.
    """
    reader = CorpusReader(prefix)
    sidecar = reader.sidecar
    model = None
    if tokenizer:
        model = Tokenizer(tokenizer)
        check_same_tokenizer(prefix, sidecar, str(tokenizer), model.sha256)
    count = len(reader.documents) - 1
    missing = [number for number in documents if not 0 <= number < count]
    if missing:
        raise UserError(f"there is no document {missing[0]}", prefix, f"give a number from 0 to {count - 1}")
    spread = np.linspace(0, count - 1, min(sample, count)).astype(int).tolist()
    return Inspection(
        prefix=prefix,
        id_type=reader.dtype.name,
        documents=count,
        sequences=len(reader),
        tokens=len(reader.tokens),
        lengths=_length_quantiles(reader),
        verified_by=sidecar.tokenizer_sha256[:12] if sidecar else None,
        packed=reader.packed,
        padding=sidecar.padding if sidecar else 0,
        made=sidecar.made if sidecar else {},
        shown=tuple(_excerpt(reader, number, model) for number in [*documents, *spread]),
    )


def _length_quantiles(reader: CorpusReader) -> dict[str, int]:
    count = len(reader.documents) - 1
    if not len(reader):
        return {}
    indices = np.linspace(0, count - 1, min(count, _MAX_LENGTHS)).astype(np.int64)
    lengths = reader.document_starts(indices + 1) - reader.document_starts(indices)
    percents = {"min": 0, "25 %": 25, "median": 50, "75 %": 75, "max": 100}
    return {name: int(np.percentile(lengths, percent, method="lower")) for name, percent in percents.items()}


def _excerpt(reader: CorpusReader, number: int, model: Tokenizer | None) -> DocumentExcerpt:
    document = reader.document(number)
    ids = tuple(document[:_MAX_IDS].tolist())
    kind = "sample" if reader.packed else "document"
    return DocumentExcerpt(number, len(document), ids, model.decode(ids) if model else None, kind)
