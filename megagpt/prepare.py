"""Text to a tokenizer, and text to a corpus: what `megagpt tokenizer train` and `megagpt prepare` do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import DEFAULT_FRACTION, Document, in_validation, read_documents
from megagpt.data.indexed import corpus_file
from megagpt.data.indexed_writer import Writer
from megagpt.data.tokenizer import Losses, Tokenizer, losses, train_tokenizer, without_surrogates
from megagpt.errors import UserError

DEFAULT = "default"  # the word that stands for the default corpus among the inputs


@dataclass(frozen=True)
class Oddities:
    """What was unusual in the input: documents without text, and characters by kind (see `Losses`)."""

    empty_documents: int = 0
    invalid_utf8: int = 0
    lone_surrogates: int = 0
    lower_blocks: int = 0
    control_symbols: int = 0

    def plus(self, document: Document, lost: Losses) -> Oddities:
        """These counts and those of one more document."""
        return Oddities(
            self.empty_documents + (not document.text),
            self.invalid_utf8 + document.invalid_utf8,
            self.lone_surrogates + lost.lone_surrogates,
            self.lower_blocks + lost.lower_blocks,
            self.control_symbols + lost.control_symbols,
        )

    def lines(self) -> list[str]:
        """A sentence for each kind that occurred."""
        told = [
            (self.empty_documents, "empty documents, passed over"),
            (self.invalid_utf8, "places that are not UTF-8, now U+FFFD"),
            (self.lone_surrogates, "lone surrogates, now U+FFFD"),
            (self.lower_blocks, "characters U+2581, which come back as blanks"),
            (self.control_symbols, "spellings of <eod> in the text, kept as text"),
        ]
        return [f"{count:,} {what}" for count, what in told if count]


@dataclass(frozen=True)
class TokenizerSummary:
    """What `tokenizer train` did. `text_bytes` are the UTF-8 bytes of all documents read."""

    path: str
    source: str
    vocab_size: int
    documents: int
    text_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.source}\n"
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
class PrepareSummary:
    """What `prepare` did. `validation` is None where no documents were put aside."""

    source: str
    train: PartSummary
    validation: PartSummary | None
    oddities: Oddities
    seconds: float

    def __str__(self) -> str:
        parts = [str(part) for part in (self.train, self.validation) if part]
        odd = [f"odd: {line}" for line in self.oddities.lines()]
        return "\n".join([self.source, *parts, *odd, f"prepared in {self.seconds:.1f} s"])


def train_tokenizer_command(
    inputs: Sequence[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    validation_fraction: float = DEFAULT_FRACTION,
) -> TokenizerSummary:
    """Train a tokenizer on the documents of the inputs and write OUTPUT.model.

    The documents that `prepare` would put aside at this fraction are left out: nothing that is measured on them
    has seen them. Raises UserError for inputs that cannot be read or a vocabulary that does not fit the text.
    """
    begin = time.perf_counter()
    source, documents = open_inputs(inputs)
    count = _Counted(document.text for document in documents if not in_validation(document, validation_fraction))
    path = train_tokenizer(count, vocab_size, output)
    return TokenizerSummary(
        str(path), source, vocab_size, count.documents, count.text_bytes, time.perf_counter() - begin
    )


def prepare_command(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
    validation_fraction: float = DEFAULT_FRACTION,
) -> PrepareSummary:
    """Write OUTPUT.train.bin/.idx/.json and, for a fraction above 0, OUTPUT.validation.*: no document is in both.

    Each document's ids are followed by the end-of-document symbol; an empty one gives none. Nothing is left
    behind when it fails. Raises UserError for broken input, and when a part would be empty.
    """
    begin = time.perf_counter()
    _check_fraction(validation_fraction, f"{os.fspath(output)}.validation")
    model = Tokenizer(tokenizer)
    source, documents = open_inputs(inputs)
    oddities = Oddities()
    with ExitStack() as stack:
        train = stack.enter_context(Writer(f"{os.fspath(output)}.train", model.vocab_size))
        held_out = train
        if validation_fraction:
            held_out = stack.enter_context(Writer(f"{os.fspath(output)}.validation", model.vocab_size))
        for document in documents:
            lost = _add(held_out if in_validation(document, validation_fraction) else train, document, model)
            oddities = oddities.plus(document, lost)
        parts = [train] if held_out is train else [train, held_out]
        _check_parts(parts, validation_fraction)
        for part in parts:
            part.finish(model.sha256, model.eod)
    summaries = [PartSummary(part.prefix, part.documents, part.tokens, part.text_bytes) for part in parts]
    validation = summaries[1] if len(summaries) > 1 else None
    return PrepareSummary(source, summaries[0], validation, oddities, time.perf_counter() - begin)


def open_inputs(inputs: Sequence[str]) -> tuple[str, Iterable[Document]]:
    """A line that says what is read, and its documents. No input, or the word `default`: the default corpus."""
    if not inputs or list(inputs) == [DEFAULT]:
        corpus = default_corpus()
        return corpus.description, corpus.documents
    if DEFAULT in inputs:
        do = f"leave out one of them, or write ./{DEFAULT} if it is a file"
        raise UserError(f"`{DEFAULT}` stands for the default corpus and cannot be mixed with files", "INPUT", do)
    return "text from " + ", ".join(inputs), read_documents(inputs)


def _add(writer: Writer, document: Document, tokenizer: Tokenizer) -> Losses:
    """Write one document, and say what its text loses."""
    ids = tokenizer.encode(document.text)
    if ids:
        ids.append(tokenizer.eod)
    writer.add_document(ids, len(without_surrogates(document.text).encode()))
    return losses(document.text)


def _check_fraction(fraction: float, prefix: str) -> None:
    """Raise UserError for a fraction out of range, or when an older validation part would meet its own documents."""
    if not 0 <= fraction < 1:
        what = f"the validation fraction is {fraction}"
        raise UserError(what, "--validation-fraction", "give a share from 0 up to, not including, 1")
    old = corpus_file(prefix, ".idx")
    if fraction == 0 and old.exists():
        what = "an older validation part is there, and its documents would now be trained on too"
        raise UserError(what, str(old), "remove it, choose another --output, or a --validation-fraction above 0")


def _check_parts(parts: Sequence[Writer], fraction: float) -> None:
    """Raise UserError for a part without tokens: training would only stumble over it later."""
    documents = sum(part.documents for part in parts)
    for part in parts:
        if part.tokens == 0 and part is parts[0]:
            what = f"none of the {documents} documents gave a token to train on"
            raise UserError(what, part.prefix, "give files that hold text, or lower --validation-fraction")
        if part.tokens == 0:
            what = f"none of the {documents} documents fell into the validation part ({fraction:g} of them, by hash)"
            do = "give more documents (cut a large file into several), raise --validation-fraction, or set it to 0"
            raise UserError(what, part.prefix, do)


class _Counted:
    """Passes texts on and counts them and their UTF-8 bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.documents = self.text_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.documents += 1
            self.text_bytes += len(without_surrogates(text).encode())
            yield text
