"""Sources to one corpus: pieces encoded to shards, shards joined, both parts published."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from megagpt import __version__
from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.data.indexed import Reader, corpus_file
from megagpt.data.indexed_writer import Writer
from megagpt.data.oddities import OddInput
from megagpt.data.pieces import Piece, cut
from megagpt.data.shards import Record
from megagpt.data.sniffing import Kind
from megagpt.data.sources import Source
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.prepare import odd_places, workplace
from megagpt.prepare.duplicates import first_copies
from megagpt.prepare.encoding import Job, PieceError, cannot_write
from megagpt.prepare.joining import join
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
    None of `workers` is as many as there are cores; their number does not change what is written.
    """

    validation_fraction: float = DEFAULT_FRACTION
    workers: int | None = None
    text_key: str = "text"
    strict: bool = False
    deduplicate: bool = False
    shuffle: bool = False
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
    """Write OUTPUT.train.* and OUTPUT.validation.*: each rank encodes its share, the first one joins the shards.

    Progress is shown on `out`. Raises UserError for input that cannot be read and when a part would be empty,
    MachineError for a full disk.
    """
    begin = time.perf_counter()
    options = work.options
    key = tuple(options.text_key.split("."))
    job = Job(work.folder, work.model.path, options.validation_fraction, key, options.strict)
    missing, pieces = ranks.first(lambda: _begun(work, out))
    work.folder.mkdir(parents=True, exist_ok=True)  # where the disk is not shared
    records, failure = _encoded(job, missing[ranks.rank :: ranks.size], options.workers, ranks, out)
    ranks.gather_files(work.folder, [f"{one.number}.{suffix}" for one in records for suffix in ("bin", "rows", "json")])
    failures = [failure for failure in ranks.all(failure) if failure]
    return ranks.first(lambda: _finished(work, pieces, failures, begin))


def _begun(work: Work, out: TextIO | None) -> tuple[list[Piece], int]:
    """The pieces that have no shard yet, and how many there are in all."""
    check_fraction(work.options.validation_fraction, f"{work.output}.validation")
    try:
        workplace.follow(work.folder, _plan(work))
    except OSError as error:
        raise cannot_write(error, work.folder) from None
    pieces = cut(work.sources)
    there = workplace.records(work.folder, len(pieces))
    if there and out:
        out.write(f"prepare: going on, {len(there):,} of {len(pieces):,} pieces are done\n")
    return [piece for piece in pieces if piece.number not in there], len(pieces)


def _encoded(
    job: Job, pieces: Sequence[Piece], workers: int | None, ranks: Ranks, out: TextIO | None
) -> tuple[list[Record], PieceError | None]:
    """The records of this rank's pieces, or the first piece that failed."""
    count = workers or (len(os.sched_getaffinity(0)) if ranks.size == 1 else 1)
    try:
        with shown(sum(piece.size for piece in pieces), out if ranks.rank == 0 else None) as progress:
            return encode_all(job, pieces, count, progress.add), None
    except PieceError as failure:
        if not isinstance(failure.cause, UserError | OddInput):
            raise
        return [], failure


def _finished(work: Work, pieces: int, failures: Sequence[PieceError], begin: float) -> PrepareSummary:
    """Publish the corpora from the shards. Raises what the first piece that failed, if any, failed by."""
    records = workplace.records(work.folder, pieces)
    if failures:
        failure = min(failures, key=lambda failure: failure.number)
        if not isinstance(failure.cause, OddInput):
            raise failure.cause
        earlier = [record.oddities for number, record in records.items() if number < failure.number]
        raise odd_places.strict_error(failure.cause, earlier, work.sources)
    odd = odd_places.told([record.oddities for record in records.values()], work.sources)
    try:
        joined = _joined(work, list(records.values()), odd)
    except OSError as error:
        raise cannot_write(error, work.folder) from None
    validation = joined.parts[1] if len(joined.parts) > 1 else None
    seconds = time.perf_counter() - begin
    return PrepareSummary(
        description(work.sources),
        joined.parts[0],
        validation,
        joined.packing,
        odd,
        joined.copies,
        joined.unknown,
        seconds,
    )


class _Joined(NamedTuple):
    """The published parts, training first; how many copies of documents were left out, and ids are unknown."""

    parts: list[PartSummary]
    packing: Packing | None
    copies: int
    unknown: int


def _joined(work: Work, records: Sequence[Record], odd: Sequence[Oddity]) -> _Joined:
    options, model = work.options, work.model
    keep = first_copies(work.folder, records) if options.deduplicate else None
    names = [
        f"{work.output}.{name}" for name in (["train", "validation"] if options.validation_fraction else ["train"])
    ]
    prefixes = [str(work.folder / "unpacked") if options.pack else names[0], *names[1:]]
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(prefix, model.vocab_size)) for prefix in prefixes]
        by_validation = dict(zip((False, True), writers, strict=False))
        unknown = join(work.folder, records, by_validation, keep, options.shuffle, model.unknown)
        parts = [
            PartSummary(name, writer.documents, writer.tokens, writer.text_bytes)
            for name, writer in zip(names, writers, strict=True)
        ]
        copies = sum(record.documents for record in records) - sum(part.documents for part in parts)
        try:
            _check_parts(parts, options.validation_fraction, [str(kind) for kind in odd])
        except UserError:
            workplace.remove(work.folder)
            raise
        made = _made(options, odd) | {"copies_left_out": copies, "unknown": unknown}
        packing = _packed(work, writers.pop(0), parts[0], made) if options.pack else None
        for writer in writers:
            writer.finish(model.sha256, model.eod, made)
    return _Joined(parts, packing, copies, unknown)


def _packed(work: Work, unpacked: Writer, part: PartSummary, made: dict[str, object]) -> Packing:
    """Publish the training part packed, from what was written of it as it came."""
    model, seq_len = work.model, work.options.pack
    assert seq_len is not None
    unpacked.finish_unverified()
    with Writer(part.prefix, model.vocab_size) as writer:
        packing = pack(Reader(unpacked.prefix), writer, seq_len, model.eod, work.folder)
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
        "version": 1,
        "sources": [[source.path, source.kind.value, source.size, source.state] for source in work.sources],
        "tokenizer": work.model.sha256,
        "text_key": work.options.text_key,
        "validation_fraction": work.options.validation_fraction,
    }


def _made(options: Options, odd: Sequence[Oddity]) -> dict[str, object]:
    """What the sidecar says about the making: nothing of who worked, since the bytes do not depend on it."""
    return {
        "by": f"megagpt {__version__}",
        "options": {name: value for name, value in asdict(options).items() if name != "workers"},
        "odd": {kind.kind: kind.count for kind in odd},
    }


def _check_parts(parts: Sequence[PartSummary], fraction: float, odd: Sequence[str]) -> None:
    """Raise UserError for a part without tokens: training would only stumble over it later."""
    documents = sum(part.documents for part in parts)
    for part in parts:
        if part.tokens == 0 and part is parts[0]:
            what = f"none of the {documents} documents gave a token to train on"
            do = "give files that hold text, or lower --validation-fraction"
            raise UserError(what, "\n".join([part.prefix, *odd]), do)
        if part.tokens == 0:
            what = f"none of the {documents} documents fell into the validation part ({fraction:g} of them, by hash)"
            do = "give more documents (cut a large file into several), raise --validation-fraction, or set it to 0"
            raise UserError(what, part.prefix, do)
