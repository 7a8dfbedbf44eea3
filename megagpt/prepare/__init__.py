"""Text to a tokenizer, and text to a corpus: what `megagpt tokenizer train` and `megagpt prepare` do."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import DEFAULT_FRACTION, digest_of, in_validation
from megagpt.data.indexed import corpus_file
from megagpt.data.indexed_writer import Writer
from megagpt.data.oddities import KINDS, OddInput, Oddities, Place
from megagpt.data.pieces import cut
from megagpt.data.reading import whole_documents
from megagpt.data.shards import Record
from megagpt.data.sources import Kind, Source, find_sources
from megagpt.data.tokenizer import Tokenizer, train_tokenizer
from megagpt.errors import UserError
from megagpt.prepare.encoding import Job, PieceError, Report, cannot_write
from megagpt.prepare.joining import join
from megagpt.prepare.pool import encode_all
from megagpt.prepare.summary import Oddity, PartSummary, PrepareSummary, TokenizerSummary
from megagpt.prepare.workplace import Workplace


@dataclass(frozen=True)
class Options:
    """How text is prepared. `text_key` leads to the text in JSON lines, through dots; `strict` makes oddities errors.

    None of `workers` is as many as there are cores; their number does not change what is written.
    """

    validation_fraction: float = DEFAULT_FRACTION
    workers: int | None = None
    text_key: str = "text"
    strict: bool = False


def train_tokenizer_command(
    inputs: Sequence[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    validation_fraction: float = DEFAULT_FRACTION,
    text_key: str = "text",
) -> TokenizerSummary:
    """Train a tokenizer on the documents of the inputs and write OUTPUT.model.

    The documents that `prepare` would put aside at this fraction are left out: nothing that is measured on them
    has seen them. Raises UserError for inputs that cannot be read or a vocabulary that does not fit the text.
    """
    begin = time.perf_counter()
    sources = find_sources(inputs)
    documents = whole_documents(sources, tuple(text_key.split(".")), Oddities())
    count = _Counted(
        document.text
        for document in documents
        if not in_validation(digest_of(document.key or document.text), validation_fraction)
    )
    path = train_tokenizer(count, vocab_size, output)
    seconds = time.perf_counter() - begin
    source = _description(sources, inputs)
    return TokenizerSummary(str(path), source, vocab_size, count.documents, count.text_bytes, seconds)


def prepare_command(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options | None = None,
) -> PrepareSummary:
    """Write OUTPUT.train.bin/.idx/.json and, for a fraction above 0, OUTPUT.validation.*: no document is in both.

    Each document's ids are followed by the end-of-document symbol; an empty one gives none. When it fails or is
    killed, nothing that looks like a corpus is there, and the same call goes on where it stopped.
    Raises UserError for input that cannot be read, and when a part would be empty.
    """
    begin = time.perf_counter()
    options = options or Options()
    output = os.fspath(output)
    _check_fraction(options.validation_fraction, f"{output}.validation")
    model, sources = Tokenizer(tokenizer), find_sources(inputs)
    job = Job(
        Path(output + ".prepare"), Path(tokenizer), options.validation_fraction,
        tuple(options.text_key.split(".")), options.strict,
    )  # fmt: skip
    with Workplace(output) as workplace:
        try:
            workplace.follow(_plan(sources, model, options))
            records = _encoded(workplace, job, sources, options.workers, lambda *counts: None)
            parts = _written(output, model, records, options.validation_fraction, workplace)
        except OSError as error:
            raise cannot_write(error, workplace.folder) from None
        workplace.remove()
    summaries = [PartSummary(part.prefix, part.documents, part.tokens, part.text_bytes) for part in parts]
    return PrepareSummary(
        _description(sources, inputs),
        summaries[0],
        summaries[1] if len(summaries) > 1 else None,
        _oddities([record.oddities for record in records], sources),
        time.perf_counter() - begin,
    )


def _encoded(
    workplace: Workplace, job: Job, sources: Sequence[Source], workers: int | None, report: Report
) -> list[Record]:
    """The records of all shards, in order; those that are not there yet are made."""
    pieces = cut(sources)
    there = workplace.records(len(pieces))
    missing = [piece for piece in pieces if piece.number not in there]
    try:
        new = encode_all(job, missing, workers or len(os.sched_getaffinity(0)), report)
    except PieceError as failure:
        if not isinstance(failure.cause, OddInput):
            raise failure.cause from failure
        earlier = [record.oddities for n, record in workplace.records(failure.number).items()]
        raise _strict_error(failure.cause, earlier, sources) from None
    there |= {record.number: record for record in new}
    return [there[piece.number] for piece in pieces]


def _written(
    output: str, model: Tokenizer, records: Sequence[Record], fraction: float, workplace: Workplace
) -> list[Writer]:
    """The corpora, written from the shards and published: training first."""
    with ExitStack() as stack:
        names = ["train", "validation"] if fraction else ["train"]
        parts = [stack.enter_context(Writer(f"{output}.{name}", model.vocab_size)) for name in names]
        join(workplace.folder, records, dict(zip((False, True), parts, strict=False)))
        try:
            _check_parts(parts, fraction)
        except UserError:
            workplace.remove()
            raise
        for part in parts:
            part.finish(model.sha256, model.eod)
    return parts


def _plan(sources: Sequence[Source], model: Tokenizer, options: Options) -> dict[str, object]:
    """All that the shards depend on."""
    return {
        "version": 1,
        "sources": [[source.path, source.kind.value, source.size, source.state] for source in sources],
        "tokenizer": model.sha256,
        "text_key": options.text_key,
        "validation_fraction": options.validation_fraction,
    }


def _description(sources: Sequence[Source], inputs: Sequence[str]) -> str:
    """A line that says what is read."""
    if sources[0].kind is Kind.DEFAULT:
        return default_corpus().description
    return "text from " + ", ".join(inputs)


def _place(place: Place, earlier: Mapping[int, int], sources: Sequence[Source]) -> str:
    """A place for people. `earlier` lines of each source were read before those that it counts from."""
    path = sources[place.source].path
    return f"{path}:{earlier.get(place.source, 0) + place.line}" if place.line else path


def _oddities(shards: Iterable[Oddities], sources: Sequence[Source]) -> tuple[Oddity, ...]:
    """All kinds that occurred, from shards in their order."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    lines: Counter[int] = Counter()
    for shard in shards:
        counts.update(shard.counts)
        for kind, place in shard.first.items():
            first.setdefault(kind, _place(place, lines, sources))
        lines.update(shard.lines)
    return tuple(Oddity(kind, counts[kind], first[kind]) for kind in KINDS if counts[kind])


def _strict_error(odd: OddInput, earlier: Iterable[Oddities], sources: Sequence[Source]) -> UserError:
    lines: Counter[int] = Counter()
    for shard in earlier:
        lines.update(shard.lines)
    what = f"odd input: {KINDS[odd.kind].split(', ')[0]}" + (f": {odd.detail}" if odd.detail else "")
    return UserError(what, _place(odd.place, lines, sources), "mend it, or leave out --strict to have such counted")


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
            self.text_bytes += len(text.encode("utf-8", "surrogatepass"))
            yield text
