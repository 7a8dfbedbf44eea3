"""Sources to one corpus: pieces encoded to shards, shards joined, both parts published."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from megagpt import __version__
from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.data.indexed import CorpusReader, corpus_file, token_dtype
from megagpt.data.indexed_writer import CorpusWriter
from megagpt.data.oddities import AtPlace
from megagpt.data.pieces import Piece, cut
from megagpt.data.reading import key_of
from megagpt.data.shards import Record
from megagpt.data.sniffing import Kind
from megagpt.data.sources import Source
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.prepare import odd_places, plain, workplace
from megagpt.prepare.duplicates import first_copies
from megagpt.prepare.encoding import Job, PieceError
from megagpt.prepare.engines import check_engine
from megagpt.prepare.joining import Choice, joined, writing
from megagpt.prepare.packing import pack
from megagpt.prepare.pool import encode_all
from megagpt.prepare.progress import shown
from megagpt.prepare.ranks import Ranks
from megagpt.prepare.summary import Oddity, Packing, PartSummary, PrepareSummary


@dataclass(frozen=True)
class Options:
    """How text is prepared. `text_key` leads to the text in JSON lines, through dots; `strict` makes oddities errors.

    `deduplicate` leaves out exact copies of an earlier document; `shuffle` mixes the documents, the same way each time.
    `pack` is the seq_len of the samples that the training part is packed into; None: it is written as it comes.
    None of `workers` is as many as there are cores; neither their number nor the `engine` changes what is written.
    """

    validation_fraction: float = DEFAULT_FRACTION
    workers: int | None = None
    text_key: str = "text"
    strict: bool = False
    deduplicate: bool = False
    shuffle: bool = False
    engine: str = "sentencepiece"
    pack: int | None = None


@dataclass(frozen=True)
class Work:
    """One corpus that is to be made: of what, with which tokenizer, where to, and where its shards lie meanwhile."""

    sources: Sequence[Source]
    model: Tokenizer
    output: str
    options: Options
    folder: Path


def write_corpus(work: Work, ranks: Ranks, out: TextIO | None) -> PrepareSummary:
    """Write OUTPUT.train.* and OUTPUT.validation.*: each rank encodes its share to shards, and then joins its share.

    Where the ranks do not see one folder, the first one is sent all shards, and joins them alone.
    Progress is shown on `out`. Raises UserError for input that cannot be read and when a part would be empty,
    MachineError for a full disk.
    """
    begin = time.perf_counter()
    options = work.options
    key, fraction = key_of(options.text_key), options.validation_fraction
    job = Job(work.folder, work.model, fraction, key, options.strict, options.engine)
    one_folder = ranks.see_one(work.folder.parent)
    pieces = ranks.first(lambda: _begun(work))
    held = ranks.each(lambda: _held(work, pieces, follow=not one_folder))
    done = set().union(*held)
    if done and out and ranks.rank == 0:
        out.write(f"prepare: going on, {len(done):,} of {len(pieces):,} pieces are done\n")
    missing = [piece for piece in pieces if piece.number not in done]
    new, failure = _encoded(job, missing[ranks.rank :: ranks.size], options.workers, ranks, out)
    failures = [one for one in ranks.each(lambda: failure) if one]
    if one_folder:
        return _finished(work, ranks, len(pieces), failures, begin)
    numbers = [*held[ranks.rank], *(record.number for record in new)]
    ranks.gather_files(work.folder, [f"{number}.{suffix}" for number in numbers for suffix in ("bin", "rows", "json")])
    return ranks.first(lambda: _finished(work, Ranks(), len(pieces), failures, begin))


def _begun(work: Work) -> list[Piece]:
    """All pieces of the input, once the folder of their shards is there."""
    check_fraction(work.options.validation_fraction, f"{work.output}.validation")
    check_engine(work.options.engine, work.model)
    with writing(work.folder):
        workplace.follow(work.folder, _plan(work))
    return cut(work.sources)


def _held(work: Work, pieces: Sequence[Piece], follow: bool) -> list[int]:
    """The numbers of the pieces whose shards this rank has."""
    if follow:
        work.folder.parent.mkdir(parents=True, exist_ok=True)
        workplace.follow(work.folder, _plan(work))
    return list(workplace.records(work.folder, len(pieces)))


def _encoded(
    job: Job, pieces: Sequence[Piece], workers: int | None, ranks: Ranks, out: TextIO | None
) -> tuple[list[Record], PieceError | None]:
    """The records of this rank's pieces, or the first piece that failed."""
    count = workers or (len(os.sched_getaffinity(0)) if ranks.size == 1 else 1)
    try:
        with shown(sum(piece.size for piece in pieces), out if ranks.rank == 0 else None) as progress:
            return encode_all(job, pieces, count, progress.add), None
    except PieceError as failure:
        if not isinstance(failure.cause, UserError | AtPlace):
            raise
        return [], failure


def _finished(work: Work, ranks: Ranks, pieces: int, failures: Sequence[PieceError], begin: float) -> PrepareSummary:
    """Publish the corpora from the shards. Raises what the first piece that failed, if any, failed by."""
    records = ranks.first(lambda: workplace.records(work.folder, pieces))
    if failures:
        failure = min(failures, key=lambda failure: failure.number)
        if not isinstance(failure.cause, AtPlace):
            raise failure.cause
        earlier = [record.oddities for number, record in records.items() if number < failure.number]
        raise odd_places.located(failure.cause, earlier, work.sources)
    odd = odd_places.told([record.oddities for record in records.values()], work.sources)
    parts, packing, copies, unknown = _joined(work, ranks, list(records.values()), odd)
    validation = parts[1] if len(parts) > 1 else None
    seconds = time.perf_counter() - begin
    return PrepareSummary(description(work.sources), parts[0], validation, packing, odd, copies, unknown, seconds)


@plain.register
class _Joined(NamedTuple):
    """The published parts, training first; how many copies of documents were left out, and ids are unknown."""

    parts: list[PartSummary]
    packing: Packing | None
    copies: int
    unknown: int


def _joined(work: Work, ranks: Ranks, records: Sequence[Record], odd: Sequence[Oddity]) -> _Joined:
    options, model = work.options, work.model
    with writing(work.folder):
        keep = ranks.first(lambda: first_copies(work.folder, records)) if options.deduplicate else None
        kept = np.memmap(keep, np.bool_, "r") if keep else None
    prefixes = {False: str(work.folder / "unpacked") if options.pack else f"{work.output}.train"}
    if options.validation_fraction:
        prefixes[True] = f"{work.output}.validation"
    choice = Choice(work.folder, records, token_dtype(model.vocab_size).itemsize, kept, options.shuffle)
    with joined(prefixes, model, choice, ranks) as (writers, unknown):
        return ranks.first(
            lambda: _published(work, list(writers.values()), sum(r.documents for r in records), unknown, odd)
        )


def _published(
    work: Work, writers: Sequence[CorpusWriter], documents: int, unknown: int, odd: Sequence[Oddity]
) -> _Joined:
    """Give the files their names, if training and validation can use them."""
    model, options = work.model, work.options
    parts = [
        PartSummary(f"{work.output}.{name}", writer.documents, writer.tokens, writer.text_bytes)
        for name, writer in zip(("train", "validation"), writers, strict=False)
    ]
    try:
        _check_parts(parts, options.validation_fraction, odd)
    except UserError:
        workplace.remove(work.folder)
        raise
    copies = documents - sum(part.documents for part in parts)
    made = _made(options, odd) | {"copies_left_out": copies, "unknown": unknown}
    with writing(work.folder):
        packing = _packed(work, writers[0], parts[0], made) if options.pack else None
        for writer in writers[1:] if packing else writers:
            writer.finish(model.sha256, model.eod, made)
    return _Joined(parts, packing, copies, unknown)


def _packed(work: Work, unpacked: CorpusWriter, part: PartSummary, made: dict[str, object]) -> Packing:
    """Publish the training part packed, from what was written of it as it came."""
    model, seq_len = work.model, work.options.pack
    assert seq_len is not None
    unpacked.finish_without_sidecar()
    with CorpusWriter(part.prefix, model.vocab_size) as writer:
        packing = pack(CorpusReader(unpacked.prefix), writer, seq_len, model.eod, work.folder)
        writer.text_bytes = part.text_bytes
        cut = {"documents": part.documents, "cut_before": packing.cut_before, "cut_after": packing.cut_after}
        writer.finish(model.sha256, model.eod, made | {"packing": cut}, seq_len, packing.padding)
    return packing


def description(sources: Sequence[Source]) -> str:
    """A line that says what is read."""
    if sources[0].kind is Kind.DEFAULT:
        return default_corpus().description
    size = sum(source.size for source in sources) / 1e6
    what = sources[0].path if len(sources) == 1 else f"{len(sources):,} files, {sources[0].path} the first"
    return f"text from {what} ({size:,.1f} MB)"


def check_fraction(fraction: float, prefix: str) -> None:
    """Raise UserError for a fraction out of range, or when an older validation part would meet its own documents."""
    if not 0 <= fraction < 1:
        what = f"the validation fraction is {fraction}"
        raise UserError(what, "--validation-fraction", "give a share from 0 up to, not including, 1")
    old = corpus_file(prefix, ".idx")
    if fraction == 0 and old.exists():
        what = "an older validation part is there, and its documents would now be trained on too"
        raise UserError(what, str(old), "remove it, choose another --output, or a --validation-fraction above 0")


def _plan(work: Work) -> dict[str, object]:
    """All that the shards depend on."""
    return {
        "version": 2,
        "sources": [[source.path, source.kind.value, source.size, source.state] for source in work.sources],
        "tokenizer": work.model.sha256,
        "text_key": work.options.text_key,
        "engine": work.options.engine,
        "validation_fraction": work.options.validation_fraction,
    }


def _made(options: Options, odd: Sequence[Oddity]) -> dict[str, object]:
    """What the sidecar says about the making: nothing of who worked, since the bytes do not depend on it."""
    return {
        "by": f"megagpt {__version__}",
        "options": {name: value for name, value in asdict(options).items() if name != "workers"},
        "odd": {kind.kind: kind.count for kind in odd},
    }


def _check_parts(parts: Sequence[PartSummary], fraction: float, odd: Sequence[Oddity]) -> None:
    """Raise UserError for a part without tokens: training would only stumble over it later."""
    documents = sum(part.documents for part in parts)
    for part in parts:
        if part.tokens == 0 and part is parts[0]:
            what = f"none of the {documents} documents gave a token to train on"
            do = "give files that hold text, or lower --validation-fraction"
            if any(one.kind in ("no_text", "not_a_string") for one in odd):
                do = "say with --text-key where in a line, or in which column, the text stands"
            raise UserError(what, "\n".join([part.prefix, *map(str, odd)]), do)
        if part.tokens == 0:
            what = f"none of the {documents} documents fell into the validation part ({fraction:g} of them, by hash)"
            do = "give more documents (cut a large file into several), raise --validation-fraction, or set it to 0"
            raise UserError(what, part.prefix, do)
