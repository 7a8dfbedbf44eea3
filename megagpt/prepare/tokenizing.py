"""What `megagpt tokenizer train` and `megagpt tokenizer inspect` do."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.data.reading import key_of
from megagpt.data.sources import find_sources
from megagpt.data.tokenizer import Tokenizer, train_tokenizer, without_surrogates
from megagpt.errors import without_controls
from megagpt.prepare.corpus import description
from megagpt.prepare.sampling import drawn_from
from megagpt.prepare.summary import Quality, TokenizerSummary

if TYPE_CHECKING:
    from rich.text import Text

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")


def train_tokenizer_command(
    inputs: Sequence[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    validation_fraction: float = DEFAULT_FRACTION,
    text_key: str = "text",
    workers: int | None = None,
) -> TokenizerSummary:
    """Train a tokenizer on the documents of the inputs and write OUTPUT.model.

    The documents that `prepare` would put aside at this fraction are left out: nothing that is measured on them
    has seen them. `workers` read (None: as many as there are cores), and their number changes nothing.
    Raises UserError for inputs that cannot be read or a vocabulary that does not fit the text.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_sources(inputs, Path(scratch) / "stdin")
        count = workers or len(os.sched_getaffinity(0))
        drawn = drawn_from(sources, key_of(text_key), validation_fraction, count)
    path = train_tokenizer(drawn.lines, vocab_size, output)
    unseen = drawn.unseen.texts()
    quality = _quality(Tokenizer(path), unseen or drawn.seen.texts(), seen=not unseen)
    seconds = time.perf_counter() - begin
    source = description(sources)
    return TokenizerSummary(str(path), source, vocab_size, drawn.documents, drawn.text_bytes, quality, seconds)


@dataclass(frozen=True)
class Tokens:
    """A text cut into tokens: the id and the text of each (U+FFFD where bytes of one character are apart)."""

    tokens: tuple[tuple[int, str], ...]
    text_bytes: int

    def __str__(self) -> str:
        return without_controls("|".join(text for _, text in self.tokens)) + f"\n{self._figures()}"

    def coloured(self) -> Text:
        """The text with a colour for each token."""
        from rich.text import Text

        shown = Text()
        for number, (_, text) in enumerate(self.tokens):
            shown.append(without_controls(text).replace("\n", "⏎\n"), _COLOURS[number % len(_COLOURS)])
        return shown.append(f"\n{self._figures()}")

    def _figures(self) -> str:
        ratio = self.text_bytes / len(self.tokens) if self.tokens else 0.0
        return f"{len(self.tokens):,} tokens, {ratio:.2f} bytes per token"


def inspect_tokenizer(tokenizer: str | os.PathLike[str], text: str) -> Tokens:
    """Cut a text into tokens."""
    model = Tokenizer(tokenizer)
    ids = model.encode(text)
    return Tokens(tuple((number, model.decode([number])) for number in ids), len(without_surrogates(text).encode()))


def _quality(model: Tokenizer, texts: Sequence[str], seen: bool) -> Quality:
    tokens = text_bytes = unknown = lost = 0
    for text in texts:
        ids = model.encode(text)
        tokens += len(ids)
        text_bytes += len(text.encode())
        unknown += ids.count(model.unknown) if model.unknown is not None else 0
        lost += model.decode(ids) != text
    return Quality(text_bytes, seen, text_bytes / max(tokens, 1), unknown / max(tokens, 1), len(texts), lost)
