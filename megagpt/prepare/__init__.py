"""Text to a tokenizer, and text to a corpus: what `megagpt tokenizer train` and `megagpt prepare` do."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from megagpt.data.documents import DEFAULT_FRACTION, digest_of, in_validation
from megagpt.data.oddities import Oddities
from megagpt.data.reading import whole_documents
from megagpt.data.sources import Source, find_sources
from megagpt.data.tokenizer import Tokenizer, train_tokenizer
from megagpt.errors import UserError
from megagpt.prepare.corpus import Options, Work, description, write_corpus
from megagpt.prepare.ranks import Ranks, joined_ranks
from megagpt.prepare.summary import Corpora, PrepareSummary, TokenizerSummary
from megagpt.prepare.workplace import Workplace, remove, workplace_of

__all__ = [
    "Corpora",
    "Options",
    "PrepareSummary",
    "TokenizerSummary",
    "prepare_command",
    "prepare_corpora",
    "train_tokenizer_command",
]


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
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_sources(inputs, Path(scratch) / "stdin")
        documents = whole_documents(sources, tuple(text_key.split(".")), Oddities())
        count = _Counted(
            document.text
            for document in documents
            if not in_validation(digest_of(document.key or document.text), validation_fraction)
        )
        path = train_tokenizer(count, vocab_size, output)
    seconds = time.perf_counter() - begin
    return TokenizerSummary(str(path), description(sources), vocab_size, count.documents, count.text_bytes, seconds)


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
    with joined_ranks() as ranks:
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
        names = dict.fromkeys(source.corpus for source in sources)
        if not names:
            raise UserError("no file is named", ", ".join(inputs), "give at least one file of text")
        corpora = []
        for name in names:
            its_own = [source for source in sources if source.corpus == name]
            prefix, shards = (f"{output}.{name}", f"shards.{name}") if name else (output, "shards")
            corpora.append(write_corpus(Work(its_own, model, prefix, options, folder / shards), ranks, out))
        remove(folder)
    return Corpora(tuple(corpora))


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
