"""Prepares one corpus: encodes the chunks of its input to shards, merges the shards, and publishes both parts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from megagpt import __version__
from megagpt.corpus.reader import CorpusReader, corpus_file
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import MachineError, UserError
from megagpt.prepare import plain_data, workdir
from megagpt.prepare.chunks import Chunk, split_into_chunks
from megagpt.prepare.deduplicate import mark_first_copies
from megagpt.prepare.encode import ChunkError, EncodeJob
from megagpt.prepare.engines import check_engine
from megagpt.prepare.input_warnings import LocatedError, WarningCount, locate_error, summarize_warnings
from megagpt.prepare.merge_shards import DocumentSelection, merge_shards, report_write_errors
from megagpt.prepare.pack import pack
from megagpt.prepare.process_group import ProcessGroup
from megagpt.prepare.progress import show_progress
from megagpt.prepare.readers.default_corpus import default_corpus
from megagpt.prepare.readers.documents import DEFAULT_VALIDATION_FRACTION
from megagpt.prepare.readers.file_type import FileFormat
from megagpt.prepare.readers.inputs import InputFile
from megagpt.prepare.readers.reader import parse_text_key
from megagpt.prepare.shards import SUFFIXES, ShardRecord, is_intact, remove_shard
from megagpt.prepare.summary import PackingSummary, PartSummary, PrepareSummary
from megagpt.prepare.workers import encode_chunks
from megagpt.tokenizer.id_dtype import token_dtype
from megagpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """Options for preparing text. Neither `workers` nor `engine` changes the files that are written.

    Attributes:
        validation_fraction: The fraction of the documents that are assigned to the validation part.
        workers: The number of processes. If None, one process per core is used.
        text_key: The key of the text in JSON lines or table rows. Dots separate nested keys.
        strict: If True, raise an error at the first unusual input instead of counting warnings.
        deduplicate: If True, omit exact copies of earlier documents.
        shuffle: If True, shuffle the documents. The same input always gives the same order.
        engine: The tokenizer implementation, see `engines.ENGINES`.
        pack: The `seq_len` of the samples into which the training part is packed. If None, it is not packed.
    """

    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    workers: int | None = None
    text_key: str = "text"
    strict: bool = False
    deduplicate: bool = False
    shuffle: bool = False
    engine: str = "sentencepiece"
    pack: int | None = None


@dataclass(frozen=True)
class CorpusJob:
    """One corpus to prepare.

    Attributes:
        files: The input files of the corpus.
        tokenizer: The tokenizer.
        output: The prefix of the files to write.
        options: The options for preparing the text.
        folder: The folder that holds the shards until the corpus is complete.
    """

    files: Sequence[InputFile]
    tokenizer: Tokenizer
    output: str
    options: PrepareOptions
    folder: Path


def write_corpus(job: CorpusJob, ranks: ProcessGroup, out: TextIO | None) -> PrepareSummary:
    """Write OUTPUT.train.* and OUTPUT.validation.*. Collective.

    Each rank encodes some of the chunks and merges some of the shards. If the ranks do not share a file system, all
    shards are sent to the first rank, which merges them alone.

    Args:
        job: The corpus to prepare.
        ranks: The processes that share the work.
        out: The stream to which progress is written. If None, no progress is shown.

    Returns:
        A summary of what was read and written.

    Raises:
        UserError: An input cannot be read, or a part would be empty.
        MachineError: The disk is full.
    """
    begin = time.perf_counter()
    options = job.options
    encode_job = EncodeJob(
        folder=job.folder,
        tokenizer=job.tokenizer,
        validation_fraction=options.validation_fraction,
        text_key=parse_text_key(options.text_key),
        strict=options.strict,
        engine=options.engine,
    )
    is_shared = ranks.is_shared(job.folder.parent)
    chunks = ranks.first(lambda: _start(job))
    done_by_rank = ranks.each(lambda: _completed(job, chunks, create_folder=not is_shared))
    done = set().union(*done_by_rank)
    if done:
        _print(f"resuming, {len(done):,} of {len(chunks):,} chunks are done", ranks, out)
    remaining = [chunk for chunk in chunks if chunk.number not in done]
    records, failure = _encode(encode_job, remaining[ranks.rank :: ranks.size], options.workers, ranks, out)
    failures = [error for error in ranks.each(lambda: failure) if error]

    def finish(group: ProcessGroup) -> PrepareSummary:
        if failures:
            raise _user_error(job, chunks, failures)
        _verify_shards(encode_job, job, chunks, group, out)
        return _finish(job, group, len(chunks), begin)

    if is_shared:
        return finish(ranks)
    numbers = [*done_by_rank[ranks.rank], *(record.number for record in records)]
    ranks.gather_files(job.folder, [f"{number}.{suffix}" for number in numbers for suffix in SUFFIXES])
    return ranks.first(lambda: finish(ProcessGroup()))


def _start(job: CorpusJob) -> list[Chunk]:
    """Check the options, create the folder of the shards, and return the chunks of the input."""
    check_validation_fraction(job.options.validation_fraction, f"{job.output}.validation")
    check_engine(job.options.engine, job.tokenizer)
    with report_write_errors(job.folder):
        workdir.resume_or_reset(job.folder, _plan(job))
    return split_into_chunks(job.files)


def _completed(job: CorpusJob, chunks: Sequence[Chunk], create_folder: bool) -> list[int]:
    """Return the numbers of the chunks whose shards exist on this rank."""
    if create_folder:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        workdir.resume_or_reset(job.folder, _plan(job))
    return list(workdir.completed_records(job.folder, len(chunks)))


def _encode(
    job: EncodeJob, chunks: Sequence[Chunk], workers: int | None, ranks: ProcessGroup, out: TextIO | None
) -> tuple[list[ShardRecord], ChunkError | None]:
    """Encode this rank's chunks. Returns the records of their shards, and the error of the first chunk that failed.

    If a chunk failed, the list of records is empty. Otherwise the error is None.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if ranks.size == 1 else 1
    try:
        with show_progress(sum(chunk.size for chunk in chunks), out if ranks.rank == 0 else None) as progress:
            return encode_chunks(job, chunks, workers, progress.add), None
    except ChunkError as failure:
        if not isinstance(failure.cause, UserError | LocatedError):
            raise
        return [], failure


def _user_error(job: CorpusJob, chunks: Sequence[Chunk], failures: Sequence[ChunkError]) -> BaseException:
    """Return the error of the first chunk that failed, with the line number in the whole file."""
    failure = min(failures, key=lambda failure: failure.number)
    if not isinstance(failure.cause, LocatedError):
        return failure.cause
    records = workdir.completed_records(job.folder, len(chunks))
    earlier = [record.warnings for number, record in records.items() if number < failure.number]
    return locate_error(failure.cause, earlier, job.files)


def _verify_shards(
    encode_job: EncodeJob, job: CorpusJob, chunks: Sequence[Chunk], ranks: ProcessGroup, out: TextIO | None
) -> None:
    """Compare all shards with their checksums, and encode the chunks of damaged shards again. Collective.

    Raises:
        MachineError: A shard is still damaged after its chunk was encoded again.
    """
    damaged = _find_damaged(job.folder, chunks, ranks)
    if not damaged:
        return
    for chunk in damaged:
        _print(f"shard {chunk.number} is damaged and is encoded again: {chunk}", ranks, out)
    own = ranks.local_part(damaged)

    def encode_again() -> ChunkError | None:
        for chunk in own:
            remove_shard(job.folder, chunk.number)
        return _encode(encode_job, own, job.options.workers, ranks, None)[1]

    failures = [error for error in ranks.each(encode_again) if error]
    if failures:
        raise _user_error(job, chunks, failures)
    if damaged := _find_damaged(job.folder, damaged, ranks):
        where = "\n".join(str(job.folder / f"{chunk.number}.bin") for chunk in damaged)
        raise MachineError("shards are damaged, also after they were encoded again", where, "check the disk and memory")


def _find_damaged(folder: Path, chunks: Sequence[Chunk], ranks: ProcessGroup) -> list[Chunk]:
    """Return the chunks whose shards do not match the checksums in their records. Collective."""
    own = ranks.local_part(chunks)
    found = ranks.each(lambda: [chunk for chunk in own if not is_intact(folder, chunk.number)])
    return [chunk for damaged in found for chunk in damaged]


def _print(message: str, ranks: ProcessGroup, out: TextIO | None) -> None:
    if out and ranks.rank == 0:
        out.write(f"prepare: {message}\n")


def _finish(job: CorpusJob, ranks: ProcessGroup, chunks: int, begin: float) -> PrepareSummary:
    """Merge the shards, publish both parts of the corpus, and return the summary."""
    records = list(ranks.first(lambda: workdir.completed_records(job.folder, chunks)).values())
    warnings = summarize_warnings([record.warnings for record in records], job.files)
    published = _merge(job, ranks, records, warnings)
    return PrepareSummary(
        source=describe_inputs(job.files),
        train=published.parts[0],
        validation=published.parts[1] if len(published.parts) > 1 else None,
        packing=published.packing,
        oddities=warnings,
        copies=published.copies,
        unknown=published.unknown,
        seconds=time.perf_counter() - begin,
    )


@plain_data.register
class _Published(NamedTuple):
    """Result of publishing a corpus.

    Attributes:
        parts: The training part, and the validation part if there is one.
        packing: The result of packing the training part, or None if it was not packed.
        copies: The number of copies of earlier documents that were omitted.
        unknown: The number of unknown ids in all parts.
    """

    parts: list[PartSummary]
    packing: PackingSummary | None
    copies: int
    unknown: int


def _merge(
    job: CorpusJob, ranks: ProcessGroup, records: Sequence[ShardRecord], warnings: Sequence[WarningCount]
) -> _Published:
    options, tokenizer = job.options, job.tokenizer
    keep = None
    if options.deduplicate:
        with report_write_errors(job.folder):
            keep = np.memmap(ranks.first(lambda: mark_first_copies(job.folder, records)), np.bool_, "r")
    # Packing reads the merged training part and writes the final training part.
    prefixes = {False: str(job.folder / "unpacked") if options.pack else f"{job.output}.train"}
    if options.validation_fraction:
        prefixes[True] = f"{job.output}.validation"
    id_bytes = token_dtype(tokenizer.vocab_size).itemsize
    selection = DocumentSelection(job.folder, records, id_bytes, keep, options.shuffle)
    documents = sum(record.documents for record in records)
    with merge_shards(prefixes, tokenizer, selection, ranks) as (writers, unknown):
        return ranks.first(lambda: _publish(job, list(writers.values()), documents, unknown, warnings))


def _publish(
    job: CorpusJob, writers: Sequence[CorpusWriter], documents: int, unknown: int, warnings: Sequence[WarningCount]
) -> _Published:
    """Rename the files to their final names. Raises UserError if a part has no tokens."""
    tokenizer, options = job.tokenizer, job.options
    parts = [
        PartSummary(f"{job.output}.{name}", writer.documents, writer.tokens, writer.text_bytes)
        for name, writer in zip(("train", "validation"), writers, strict=False)
    ]
    try:
        _check_parts(parts, options.validation_fraction, warnings)
    except UserError:
        workdir.remove_folder(job.folder)
        raise
    copies = documents - sum(part.documents for part in parts)
    made = _provenance(options, warnings) | {"copies_left_out": copies, "unknown": unknown}
    with report_write_errors(job.folder):
        packing = _pack(job, writers[0], parts[0], made) if options.pack else None
        for writer in writers[1:] if packing else writers:
            writer.finish(tokenizer.sha256, tokenizer.eod, made)
    return _Published(parts, packing, copies, unknown)


def _pack(job: CorpusJob, unpacked: CorpusWriter, part: PartSummary, made: dict[str, object]) -> PackingSummary:
    """Publish a packed copy of the training part that `unpacked` has written."""
    tokenizer, seq_len = job.tokenizer, job.options.pack
    assert seq_len is not None
    unpacked.finish_without_sidecar()
    with CorpusWriter(part.prefix, tokenizer.vocab_size) as writer:
        packing = pack(CorpusReader(unpacked.prefix), writer, seq_len, tokenizer.eod, job.folder)
        writer.text_bytes = part.text_bytes
        facts = {"documents": part.documents, "cut_before": packing.cut_before, "cut_after": packing.cut_after}
        writer.finish(tokenizer.sha256, tokenizer.eod, made | {"packing": facts}, seq_len, packing.padding)
    return packing


def describe_inputs(files: Sequence[InputFile]) -> str:
    """Return a one-line description of the input."""
    if files[0].format is FileFormat.DEFAULT_CORPUS:
        return default_corpus().description
    megabytes = sum(file.size for file in files) / 1e6
    names = files[0].path if len(files) == 1 else f"{len(files):,} files, {files[0].path} and others"
    return f"text from {names} ({megabytes:,.1f} MB)"


def check_validation_fraction(fraction: float, prefix: str) -> None:
    """Raise UserError if the validation fraction is invalid.

    The fraction 0 is also invalid if an older validation part exists, because its documents would now be part of the
    training data.

    Args:
        fraction: The validation fraction.
        prefix: The prefix of the validation part.
    """
    if not 0 <= fraction < 1:
        what = f"the validation fraction is {fraction}"
        raise UserError(what, "--validation-fraction", "use a fraction that is at least 0 and less than 1")
    old = corpus_file(prefix, ".idx")
    if fraction == 0 and old.exists():
        what = "there is an older validation part, whose documents would now be in the training part as well"
        raise UserError(what, str(old), "remove it, choose another --output, or a --validation-fraction above 0")


def _plan(job: CorpusJob) -> dict[str, object]:
    """Return everything that the shards depend on. Shards of an earlier run are reused only if their plan is equal."""
    return {
        "version": 3,
        "sources": [[file.path, file.format.value, file.size, file.fingerprint] for file in job.files],
        "tokenizer": job.tokenizer.sha256,
        "text_key": job.options.text_key,
        "engine": job.options.engine,
        "validation_fraction": job.options.validation_fraction,
    }


def _provenance(options: PrepareOptions, warnings: Sequence[WarningCount]) -> dict[str, object]:
    """Return a description of how the corpus was made, for its sidecar.

    The number of workers is omitted because it does not change the corpus.
    """
    return {
        "by": f"megagpt {__version__}",
        "options": {name: value for name, value in asdict(options).items() if name != "workers"},
        "odd": {warning.kind: warning.count for warning in warnings},  # the key "odd" is part of the sidecar's format
    }


def _check_parts(parts: Sequence[PartSummary], fraction: float, warnings: Sequence[WarningCount]) -> None:
    """Raise UserError if a part has no tokens, because training or validation would fail later."""
    documents = sum(part.documents for part in parts)
    for part in parts:
        if part.tokens == 0 and part is parts[0]:
            what = f"no document contains a token to train on (documents: {documents:,})"
            do = "use files that contain text, or lower --validation-fraction"
            if any(warning.kind in ("no_text", "not_a_string") for warning in warnings):
                do = "set --text-key to the key or column that contains the text"
            raise UserError(what, "\n".join([part.prefix, *map(str, warnings)]), do)
        if part.tokens == 0:
            what = f"no document is in the validation part (documents: {documents:,}, {fraction:g} of them by hash)"
            do = "add documents (split a large file into several), raise --validation-fraction, or set it to 0"
            raise UserError(what, part.prefix, do)
