"""Sources to one corpus: pieces encoded to shards, shards joined, both parts published."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megagpt import __version__
from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.data.indexed import corpus_file
from megagpt.data.indexed_writer import Writer
from megagpt.data.oddities import OddInput
from megagpt.data.pieces import cut
from megagpt.data.shards import Record
from megagpt.data.sniffing import Kind
from megagpt.data.sources import Source
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.prepare import odd_places, workplace
from megagpt.prepare.duplicates import first_copies
from megagpt.prepare.encoding import Job, PieceError, cannot_write
from megagpt.prepare.joining import join
from megagpt.prepare.pool import encode_all
from megagpt.prepare.progress import shown
from megagpt.prepare.summary import Oddity, PartSummary, PrepareSummary


@dataclass(frozen=True)
class Options:
    """How text is prepared. `text_key` leads to the text in JSON lines, through dots; `strict` makes oddities errors.

    `deduplicate` leaves out exact copies of an earlier document; `shuffle` mixes the documents, the same way each time.
    None of `workers` is as many as there are cores; their number does not change what is written.
    """

    validation_fraction: float = DEFAULT_FRACTION
    workers: int | None = None
    text_key: str = "text"
    strict: bool = False
    deduplicate: bool = False
    shuffle: bool = False


def write_corpus(
    sources: Sequence[Source], model: Tokenizer, output: str, options: Options, folder: Path, out: TextIO | None
) -> PrepareSummary:
    """Write OUTPUT.train.* and OUTPUT.validation.* from the sources; the shards lie in `folder` meanwhile.

    Progress is shown on `out`. Raises UserError for input that cannot be read and when a part would be empty,
    MachineError for a full disk.
    """
    begin = time.perf_counter()
    check_fraction(options.validation_fraction, f"{output}.validation")
    key = tuple(options.text_key.split("."))
    job = Job(folder, model.path, options.validation_fraction, key, options.strict)
    try:
        workplace.follow(folder, _plan(sources, model, options))
        records = _encoded(job, sources, options.workers, out)
        odd = odd_places.told([record.oddities for record in records], sources)
        made = _made(options, odd)
        parts, copies, unknown = _joined(records, model, output, options, folder, odd, made)
    except OSError as error:
        raise cannot_write(error, folder) from None
    summaries = [PartSummary(part.prefix, part.documents, part.tokens, part.text_bytes) for part in parts]
    validation = summaries[1] if len(summaries) > 1 else None
    seconds = time.perf_counter() - begin
    return PrepareSummary(description(sources), summaries[0], validation, odd, copies, unknown, seconds)


def _joined(
    records: Sequence[Record],
    model: Tokenizer,
    output: str,
    options: Options,
    folder: Path,
    odd: Sequence[Oddity],
    made: dict[str, object],
) -> tuple[list[Writer], int, int]:
    """The published parts, training first; how many copies of documents were left out, and ids are unknown."""
    keep = first_copies(folder, records) if options.deduplicate else None
    names = ["train", "validation"] if options.validation_fraction else ["train"]
    with ExitStack() as stack:
        parts = [stack.enter_context(Writer(f"{output}.{name}", model.vocab_size)) for name in names]
        by_validation = dict(zip((False, True), parts, strict=False))
        unknown = join(folder, records, by_validation, keep, options.shuffle, model.unknown)
        copies = sum(record.documents for record in records) - sum(part.documents for part in parts)
        try:
            _check_parts(parts, options.validation_fraction, [str(kind) for kind in odd])
        except UserError:
            workplace.remove(folder)
            raise
        for part in parts:
            part.finish(model.sha256, model.eod, made | {"copies_left_out": copies, "unknown": unknown})
    return parts, copies, unknown


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


def _plan(sources: Sequence[Source], model: Tokenizer, options: Options) -> dict[str, object]:
    """All that the shards depend on."""
    return {
        "version": 1,
        "sources": [[source.path, source.kind.value, source.size, source.state] for source in sources],
        "tokenizer": model.sha256,
        "text_key": options.text_key,
        "validation_fraction": options.validation_fraction,
    }


def _made(options: Options, odd: Sequence[Oddity]) -> dict[str, object]:
    """What the sidecar says about the making: nothing of who worked, since the bytes do not depend on it."""
    return {
        "by": f"megagpt {__version__}",
        "options": {name: value for name, value in asdict(options).items() if name != "workers"},
        "odd": {kind.kind: kind.count for kind in odd},
    }


def _encoded(job: Job, sources: Sequence[Source], workers: int | None, out: TextIO | None) -> list[Record]:
    """The records of all shards, in order; those that are not there yet are made."""
    pieces = cut(sources)
    there = workplace.records(job.folder, len(pieces))
    missing = [piece for piece in pieces if piece.number not in there]
    if there and out:
        out.write(f"prepare: going on, {len(there):,} of {len(pieces):,} pieces are done\n")
    try:
        with shown(sum(piece.size for piece in missing), out) as progress:
            new = encode_all(job, missing, workers or len(os.sched_getaffinity(0)), progress.add)
    except PieceError as failure:
        if not isinstance(failure.cause, OddInput):
            raise failure.cause from failure
        earlier = workplace.records(job.folder, failure.number).values()
        raise odd_places.strict_error(failure.cause, [record.oddities for record in earlier], sources) from None
    there |= {record.number: record for record in new}
    return [there[piece.number] for piece in pieces]


def _check_parts(parts: Sequence[Writer], fraction: float, odd: Sequence[str]) -> None:
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
