"""Text to a tokenizer, and text to a corpus: what `megagpt tokenizer train` and `megagpt prepare` do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from megagpt.data.sources import Source, find_sources
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.prepare.corpus import Options, Work, write_corpus
from megagpt.prepare.ranks import Ranks, joined_ranks
from megagpt.prepare.summary import Corpora, PrepareSummary, TokenizerSummary
from megagpt.prepare.tokenizing import Tokens, inspect_tokenizer, train_tokenizer_command
from megagpt.prepare.workplace import Workplace, remove, workplace_of

__all__ = [
    "Corpora",
    "Options",
    "PrepareSummary",
    "TokenizerSummary",
    "Tokens",
    "inspect_tokenizer",
    "prepare_command",
    "prepare_corpora",
    "train_tokenizer_command",
]


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
    (summary,) = _prepared(inputs, Tokenizer(tokenizer), os.fspath(output), options or Options(), Ranks(), None).corpora
    return summary


def prepare_corpora(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options | None = None,
    out: TextIO | None = None,
) -> Corpora | None:
    """As `prepare_command`, with progress shown on `out`; a manifest's corpora one after the other, as OUTPUT.NAME.

    Started by mpirun or srun, the processes share the work, and the first one joins what they made and has the answer.
    """
    with joined_ranks(workplace_of(os.fspath(output)).parent) as ranks:
        made = _prepared(inputs, Tokenizer(tokenizer), os.fspath(output), options or Options(), ranks, out)
        return made if ranks.rank == 0 else None


def _prepared(
    inputs: Sequence[str], model: Tokenizer, output: str, options: Options, ranks: Ranks, out: TextIO | None
) -> Corpora:
    folder = workplace_of(output)
    with ExitStack() as stack:

        def begun() -> list[Source]:
            stack.enter_context(Workplace(folder))
            return find_sources(inputs, folder / "stdin")

        sources = ranks.first(begun)
        names = {source.corpus: source.weight for source in sources}
        if not names:
            raise UserError("no file is named", ", ".join(inputs), "give at least one file of text")
        corpora = []
        for name in names:
            its_own = [source for source in sources if source.corpus == name]
            prefix, shards = (f"{output}.{name}", f"shards.{name}") if name else (output, "shards")
            corpora.append(write_corpus(Work(its_own, model, prefix, options, folder / shards), ranks, out))
        remove(folder)
    return Corpora.of(corpora, list(names.values()))
