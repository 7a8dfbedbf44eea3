"""Summaries that `prepare` and `tokenizer train` print when they finish. Their fields are the keys of --json output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagpt.prepare.input_warnings import WarningCount


@dataclass(frozen=True)
class TokenizerQuality:
    """Quality of a tokenizer, measured on a sample of documents.

    Attributes:
        text_bytes: The size of the sample in bytes of UTF-8.
        seen: True if the tokenizer was trained on documents of the sample.
        bytes_per_token: Bytes of text per token.
        unknown: The fraction of the tokens that are the unknown token.
        documents: The number of documents in the sample.
        lost: The number of documents that are not equal to their text after encoding and decoding.
    """

    text_bytes: int
    seen: bool
    bytes_per_token: float
    unknown: float
    documents: int
    lost: int

    def __str__(self) -> str:
        text = f"{self.text_bytes / 1e6:.2f} MB of {'training' if self.seen else 'unseen'} text"
        if self.lost:
            roundtrip = f"{self.lost} of {self.documents} documents do not decode to their text"
        else:
            roundtrip = "lossless"
        return f"on {text}: {self.bytes_per_token:.2f} bytes per token, {self.unknown:.3%} unknown, {roundtrip}"


@dataclass(frozen=True)
class TokenizerSummary:
    """Result of `tokenizer train`.

    Attributes:
        path: The path of the tokenizer.
        source: A description of the input.
        vocab_size: The size of the vocabulary, including special tokens.
        documents: The number of documents in the training part of the input.
        text_bytes: The size of these documents in bytes of UTF-8.
        quality: The measured quality of the tokenizer.
        seconds: The duration of the command.
    """

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
            f"{self.path}: {self.vocab_size:,} tokens, trained on {self.documents:,} documents "
            f"({self.text_bytes / 1e6:.1f} MB) in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class PartSummary:
    """One part of a corpus, training or validation.

    Attributes:
        prefix: The prefix of the part's files.
        documents: The number of documents.
        tokens: The number of tokens.
        text_bytes: The size of the text in bytes of UTF-8.
    """

    prefix: str
    documents: int
    tokens: int
    text_bytes: int

    def __str__(self) -> str:
        bytes_per_token = self.text_bytes / self.tokens if self.tokens else 0.0
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.text_bytes / 1e6:.2f} MB, {bytes_per_token:.2f} bytes per token"
        )


@dataclass(frozen=True)
class PackingSummary:
    """Result of packing the training part.

    Attributes:
        seq_len: Tokens per sample, without the last label.
        samples: The number of samples, each of `seq_len + 1` tokens.
        padding: The number of padding tokens.
        documents: The number of documents.
        cut_before: The expected number of documents that would be split without packing, averaged over all tokens at
            which the first sample may begin.
        cut_after: The number of documents that are split. Only documents longer than a sample are split.
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
            f"documents split: {before:.1%} unpacked, {after:.1%} packed (longer than a sample)"
        )


@dataclass(frozen=True)
class PrepareSummary:
    """Result of preparing one corpus.

    Attributes:
        source: A description of the input.
        train: The training part.
        validation: The validation part, if there is one.
        packing: The result of packing the training part, if it was packed.
        oddities: The warnings about the input.
        copies: The number of omitted copies of earlier documents.
        unknown: The number of unknown tokens, which stand for text that the vocabulary does not cover.
        seconds: The duration of preparing the corpus.
    """

    source: str
    train: PartSummary
    validation: PartSummary | None
    packing: PackingSummary | None
    oddities: tuple[WarningCount, ...]
    copies: int
    unknown: int
    seconds: float

    def __str__(self) -> str:
        parts = [part for part in (self.train, self.validation) if part]
        megabytes = sum(part.text_bytes for part in parts) / 1e6
        unknown = self.unknown / sum(part.tokens for part in parts)
        lines = [self.source, *map(str, parts)]
        if self.packing:
            lines.append(str(self.packing))
        if self.copies:
            lines.append(f"{self.copies:,} exact copies of earlier documents omitted")
        lines.append(f"unknown: {unknown:.3%} of tokens")
        lines.extend(map(str, self.oddities))
        lines.append(f"prepared in {self.seconds:.1f} s ({megabytes / self.seconds:.1f} MB/s)")
        return "\n".join(lines)


@dataclass(frozen=True)
class PreparedCorpora:
    """Result of `prepare`.

    Attributes:
        corpora: The summary of each corpus.
        data: The `data` section of a recipe that trains on all corpora. Empty if there is only one corpus.
    """

    corpora: tuple[PrepareSummary, ...]
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_summaries(cls, corpora: Sequence[PrepareSummary], weights: Sequence[float | None]) -> PreparedCorpora:
        """Build the result from the summaries of all corpora.

        Args:
            corpora: The summary of each corpus.
            weights: The weight of each corpus in the blend. If one of them is None, the blend reads all corpora equally
                often.
        """
        if len(corpora) == 1:
            return cls(tuple(corpora))
        train: list[dict[str, Any]] = [{"path": corpus.train.prefix} for corpus in corpora]
        data: dict[str, Any] = {"train": train}
        if None in weights:
            data["weight_counts"] = "epochs"
        else:
            for source, weight in zip(train, weights, strict=True):
                source["weight"] = weight
        validation = [corpus.validation.prefix for corpus in corpora if corpus.validation]
        if validation:
            data["validation"] = validation
        return cls(tuple(corpora), data)

    def __str__(self) -> str:
        lines = list(map(str, self.corpora))
        if self.data:
            import yaml  # imported here because it is rarely needed

            text = yaml.safe_dump({"data": self.data}, default_flow_style=None, sort_keys=False, width=10_000)
            lines += ["for a recipe:", text.rstrip()]
        return "\n".join(lines)
