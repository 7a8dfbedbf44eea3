"""What `prepare` and `tokenizer train` say when they are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagpt.data.oddities import WARNING_KINDS


@dataclass(frozen=True)
class WarningCount:
    """One kind of what was unusual: how often, and the first place (`file`, or `file:line`)."""

    kind: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"odd: {self.count:,} {WARNING_KINDS[self.kind]}" + (f" (first: {self.first})" if self.first else "")


@dataclass(frozen=True)
class TokenizerQuality:
    """How a tokenizer does on some text that it has `seen` or not; `lost` documents do not come back from their ids."""

    text_bytes: int
    seen: bool
    bytes_per_token: float
    unknown: float  # share of the tokens
    documents: int
    lost: int

    def __str__(self) -> str:
        text = f"{self.text_bytes / 1e6:.2f} MB that it has {'' if self.seen else 'not '}seen"
        back = f"{self.lost} of {self.documents} documents do not come back" if self.lost else "all comes back"
        return f"on {text}: {self.bytes_per_token:.2f} bytes per token, {self.unknown:.3%} unknown, {back}"


@dataclass(frozen=True)
class TokenizerSummary:
    """What `tokenizer train` did. `text_bytes` are the UTF-8 bytes of all documents read."""

    path: str
    source: str
    vocab_size: int
    documents: int
    text_bytes: int
    quality: TokenizerQuality
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.source}\n{self.quality}\n"
            f"{self.path}: {self.vocab_size:,} pieces from {self.documents:,} documents "
            f"({self.text_bytes / 1e6:.1f} MB) in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class PartSummary:
    """One corpus that was written: counts, and the UTF-8 bytes of its text."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int

    def __str__(self) -> str:
        ratio = self.text_bytes / self.tokens if self.tokens else 0.0
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.text_bytes / 1e6:.2f} MB, {ratio:.2f} bytes per token"
        )


@dataclass(frozen=True)
class PackingSummary:
    """What packing made of the training part: samples of `seq_len + 1` tokens, of which `padding` hold no text.

    `cut_before` of its documents are broken where samples are cut at a fixed length, on the average of where the first
    one begins; `cut_after` are those longer than a sample, which nothing can keep whole.
    """

    seq_len: int
    samples: int
    padding: int
    documents: int
    cut_before: float
    cut_after: int

    def __str__(self) -> str:
        padding = self.padding / (self.samples * (self.seq_len + 1))
        before, after = self.cut_before / self.documents, self.cut_after / self.documents
        return (
            f"packed for seq_len {self.seq_len:,}: {self.samples:,} samples, {padding:.2%} padding; "
            f"documents cut: {before:.1%} unpacked, {after:.1%} packed (longer than a sample)"
        )


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` did. `validation` is None where no documents were put aside."""

    source: str
    train: PartSummary
    validation: PartSummary | None
    packing: PackingSummary | None
    oddities: tuple[WarningCount, ...]
    copies: int  # of earlier documents, left out
    unknown: int  # ids that stand for what the tokenizer has no piece for
    seconds: float

    def __str__(self) -> str:
        packing = [str(self.packing)] if self.packing else []
        copies = [f"{self.copies:,} exact copies of earlier documents, left out"] if self.copies else []
        both = [part for part in (self.train, self.validation) if part]
        size = sum(part.text_bytes for part in both) / 1e6
        unknown = self.unknown / sum(part.tokens for part in both)
        end = f"prepared in {self.seconds:.1f} s ({size / self.seconds:.1f} MB/s)"
        told = [f"unknown: {unknown:.3%} of tokens", *map(str, self.oddities), end]
        return "\n".join([self.source, *map(str, both), *packing, *copies, *told])


@dataclass(frozen=True)
class PreparedCorpora:
    """What `prepare` did, corpus by corpus; `data`: of several ones, what a recipe's section of that name says."""

    corpora: tuple[PrepareSummary, ...]
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, made: Sequence[PrepareSummary], weights: Sequence[float | None]) -> PreparedCorpora:
        """The corpora, blended by their weights; without weights, each is read as often as the others."""
        validation = [one.validation.prefix for one in made if one.validation]
        data: dict[str, Any] = {"train": [{"path": one.train.prefix} for one in made]}
        if None in weights:
            data["weight_counts"] = "epochs"
        else:
            for source, weight in zip(data["train"], weights, strict=True):
                source["weight"] = weight
        if validation:
            data["validation"] = validation
        return cls(tuple(made), data if len(made) > 1 else {})

    def __str__(self) -> str:
        lines = list(map(str, self.corpora))
        if self.data:
            import yaml  # here: one command in many needs it

            text = yaml.safe_dump({"data": self.data}, default_flow_style=None, sort_keys=False, width=10_000)
            lines += ["for a recipe:", text.rstrip()]
        return "\n".join(lines)
