"""A corpus for people: its figures, and documents of it as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed import CorpusReader
from megagpt.data.sidecar import check_same_tokenizer
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError

_MOST_LENGTHS = 1_000_000  # looked at for the distribution, evenly spread
_MOST_IDS = 1_000  # of a document that are shown


@dataclass(frozen=True)
class Shown:
    """One document, or packed sample: its length in tokens, its first ids, and their text if a tokenizer was given."""

    number: int
    tokens: int
    ids: tuple[int, ...]
    text: str | None
    kind: str = "document"

    def __str__(self) -> str:
        head = f"{self.kind} {self.number:,}: {self.tokens:,} tokens"
        more = " …" if self.tokens > len(self.ids) else ""
        return f"{head}\n{self.text if self.text is not None else ' '.join(map(str, self.ids))}{more}"


@dataclass(frozen=True)
class Inspection:
    """What a corpus is. `lengths` are quantiles of its documents' tokens, by name; the last facts are the sidecar's."""

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
    shown: tuple[Shown, ...] = ()

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {tokens:,}" for name, tokens in self.lengths.items())
        sidecar = f"tokenizer {self.verified_by}" if self.verified_by else "no sidecar: unverified"
        kinds = f"{self.documents:,} documents, {self.sequences:,} sequences"
        if self.packed:
            kinds = f"{self.sequences:,} samples, packed for seq_len {self.packed:,}"
        lines = [
            f"{self.prefix}: {kinds}, {self.tokens:,} tokens ({self.id_type}), {sidecar}",
            f"padding: {self.padding / self.tokens:.2%}" if self.packed else f"tokens of a document: {lengths}",
            *(f"{name}: {value}" for name, value in self.made.items()),
            *map(str, self.shown),
        ]
        return "\n".join(lines)


def inspect(prefix: str, documents: Sequence[int] = (), sample: int = 0, tokenizer: Path | None = None) -> Inspection:
    """Look into a corpus, show the named documents and `sample` others, evenly spread, as text if there is a tokenizer.

    Raises UserError for a corpus that cannot be opened, a number that is none of its documents', another tokenizer.
    """
    reader = CorpusReader(prefix)
    model = Tokenizer(tokenizer) if tokenizer else None
    sidecar = reader.sidecar
    if model:
        check_same_tokenizer(prefix, sidecar, str(tokenizer), model.sha256)
    count = len(reader.documents) - 1
    wrong = [number for number in documents if not 0 <= number < count]
    if wrong:
        raise UserError(f"there is no document {wrong[0]}", prefix, f"give a number from 0 to {count - 1}")
    spread = np.linspace(0, count - 1, min(sample, count)).astype(int).tolist()
    return Inspection(
        prefix,
        reader.dtype.name,
        count,
        len(reader),
        len(reader.tokens),
        _quantiles(reader),
        sidecar.tokenizer_sha256[:12] if sidecar else None,
        reader.packed,
        sidecar.padding if sidecar else 0,
        sidecar.made if sidecar else {},
        tuple(_shown(reader, number, model) for number in [*documents, *spread]),
    )


def _quantiles(reader: CorpusReader) -> dict[str, int]:
    count = len(reader.documents) - 1
    if not len(reader):
        return {}
    numbers = np.linspace(0, count - 1, min(count, _MOST_LENGTHS)).astype(np.int64)
    lengths = reader.document_starts(numbers + 1) - reader.document_starts(numbers)
    names = {"least": 0, "quarter": 25, "median": 50, "three quarters": 75, "most": 100}
    return {name: int(np.percentile(lengths, share, method="lower")) for name, share in names.items()}


def _shown(reader: CorpusReader, number: int, model: Tokenizer | None) -> Shown:
    document = reader.document(number)
    ids = tuple(document[:_MOST_IDS].tolist())
    kind = "sample" if reader.packed else "document"
    return Shown(number, len(document), ids, model.decode(ids) if model else None, kind)
