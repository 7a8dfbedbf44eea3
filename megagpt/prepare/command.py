"""The command `megagpt prepare`, which converts raw text to tokenized corpora."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from megagpt.errors import UserError
from megagpt.prepare.corpus import CorpusJob, PrepareOptions, write_corpus
from megagpt.prepare.process_group import ProcessGroup, process_group
from megagpt.prepare.readers.inputs import InputFile, find_input_files
from megagpt.prepare.summary import PreparedCorpora, PrepareSummary, TokenizerSummary
from megagpt.prepare.train_tokenizer import TokenizedText, inspect_tokenizer, train_tokenizer_command
from megagpt.prepare.workdir import WorkDirectory, remove_folder, work_directory
from megagpt.tokenizer.tokenizer import Tokenizer

__all__ = [
    "PrepareOptions",
    "PrepareSummary",
    "PreparedCorpora",
    "TokenizedText",
    "TokenizerSummary",
    "inspect_tokenizer",
    "prepare_command",
    "prepare_corpora",
    "train_tokenizer_command",
]


def prepare_command(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: PrepareOptions | None = None,
) -> PrepareSummary:
    """Tokenize text into OUTPUT.train.bin/.idx/.json and, if there is a validation part, OUTPUT.validation.*.

    Every document is in exactly one of the two parts. The ids of each document are followed by the end-of-document
    symbol. Empty documents have no ids. If the command fails or is killed, it leaves no incomplete corpus behind, and
    the same call resumes where it stopped.

    Args:
        inputs: Files, folders, patterns, manifests or addresses, see `find_input_files`.
        tokenizer: The path of a tokenizer.
        output: The prefix OUTPUT of the files to write.
        options: The options for preparing the text. If None, the defaults are used.

    Returns:
        A summary of what was read and written.

    Raises:
        UserError: An input cannot be read, or a part would be empty.
        MachineError: The disk is full.
    """
    prepared = _prepare(
        inputs, Tokenizer(tokenizer), os.fspath(output), options or PrepareOptions(), ProcessGroup(), None
    )
    (summary,) = prepared.corpora
    return summary


def prepare_corpora(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    out: TextIO | None = None,
) -> PreparedCorpora | None:
    """Prepare one corpus or, if a manifest names several, each of them as OUTPUT.NAME, one after the other.

    If the command was started by mpirun or srun, all of its processes share the work.

    Args:
        inputs: Files, folders, patterns, manifests or addresses, see `find_input_files`.
        tokenizer: The path of a tokenizer.
        output: The prefix OUTPUT of the files to write.
        options: The options for preparing the text. If None, the defaults are used.
        out: The stream to which progress is written. If None, no progress is shown.

    Returns:
        A summary of what was read and written on the first rank, None on all other ranks.

    Raises:
        UserError: An input cannot be read, or a part would be empty.
        MachineError: The disk is full.
    """
    with process_group(work_directory(os.fspath(output)).parent) as ranks:
        prepared = _prepare(inputs, Tokenizer(tokenizer), os.fspath(output), options or PrepareOptions(), ranks, out)
        return prepared if ranks.rank == 0 else None


def _prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: str,
    options: PrepareOptions,
    ranks: ProcessGroup,
    out: TextIO | None,
) -> PreparedCorpora:
    folder = work_directory(output)
    with ExitStack() as stack:

        def lock_and_find() -> list[InputFile]:
            stack.enter_context(WorkDirectory(folder))
            return find_input_files(inputs, folder / "stdin")

        files = ranks.first(lock_and_find)
        weights = {file.corpus: file.weight for file in files}
        if not weights:
            raise UserError("the input contains no file", ", ".join(inputs), "give at least one text file")
        summaries = []
        for name in weights:
            job = CorpusJob(
                files=[file for file in files if file.corpus == name],
                tokenizer=tokenizer,
                output=f"{output}.{name}" if name else output,
                options=options,
                folder=folder / (f"shards.{name}" if name else "shards"),
            )
            summaries.append(write_corpus(job, ranks, out))
        remove_folder(folder)
    return PreparedCorpora.from_summaries(summaries, list(weights.values()))
