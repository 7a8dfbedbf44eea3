"""The commands `megagpt tokenizer train` and `megagpt tokenizer inspect`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import without_controls
from megagpt.prepare.corpus import describe_inputs
from megagpt.prepare.readers.documents import DEFAULT_VALIDATION_FRACTION
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.prepare.readers.reader import parse_text_key
from megagpt.prepare.sample_lines import sample_inputs
from megagpt.prepare.summary import TokenizerQuality, TokenizerSummary
from megagpt.tokenizer.tokenizer import Tokenizer, train_tokenizer, without_surrogates

if TYPE_CHECKING:
    from rich.text import Text

_COLORS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")


def train_tokenizer_command(
    inputs: Sequence[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    text_key: str = "text",
    workers: int | None = None,
) -> TokenizerSummary:
    """Train a tokenizer on text, and write OUTPUT.model.

    Documents that `prepare` would assign to the validation part with the same fraction are not used for training, so
    that the validation text is new to the tokenizer.

    Args:
        inputs: Files, folders, patterns, manifests or addresses, see `find_input_files`.
        vocab_size: The size of the vocabulary, including all special tokens.
        output: The prefix OUTPUT of the file to write.
        validation_fraction: The fraction of the documents that are assigned to the validation part.
        text_key: The key of the text in JSON lines or table rows. Dots separate nested keys.
        workers: The number of processes that read the input. If None, one process per core is used. The result does not
            depend on it.

    Returns:
        A summary of what was read and written, with the quality of the tokenizer.

    Raises:
        UserError: An input cannot be read, or the vocabulary is too large or too small for the text.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = find_input_files(inputs, Path(scratch) / "stdin")
        workers = workers or len(os.sched_getaffinity(0))
        sample = sample_inputs(files, parse_text_key(text_key), validation_fraction, workers)
    path = train_tokenizer(sample.lines, vocab_size, output)
    unseen = sample.unseen.texts()
    quality = _measure_quality(Tokenizer(path), unseen or sample.seen.texts(), seen=not unseen)
    return TokenizerSummary(
        path=str(path),
        source=describe_inputs(files),
        vocab_size=vocab_size,
        documents=sample.documents,
        text_bytes=sample.text_bytes,
        quality=quality,
        seconds=time.perf_counter() - begin,
    )


@dataclass(frozen=True)
class TokenizedText:
    """A text that has been split into tokens.

    Attributes:
        tokens: The id and text of each token. If a token holds only part of a character's bytes, its text is U+FFFD.
        text_bytes: The size of the whole text in bytes of UTF-8.
    """

    tokens: tuple[tuple[int, str], ...]
    text_bytes: int

    def __str__(self) -> str:
        return without_controls("|".join(text for _, text in self.tokens)) + f"\n{self._totals()}"

    def colored(self) -> Text:
        """Return the text with the tokens in alternating background colors."""
        from rich.text import Text

        colored = Text()
        for index, (_, text) in enumerate(self.tokens):
            colored.append(without_controls(text).replace("\n", "⏎\n"), _COLORS[index % len(_COLORS)])
        return colored.append(f"\n{self._totals()}")

    def _totals(self) -> str:
        bytes_per_token = self.text_bytes / len(self.tokens) if self.tokens else 0.0
        return f"{len(self.tokens):,} tokens, {bytes_per_token:.2f} bytes per token"


def inspect_tokenizer(tokenizer: str | os.PathLike[str], text: str) -> TokenizedText:
    """Split a text into tokens.

    Args:
        tokenizer: The path of a tokenizer.
        text: The text to split.

    Returns:
        The tokens of the text.
    """
    model = Tokenizer(tokenizer)
    tokens = tuple((number, model.decode([number])) for number in model.encode(text))
    return TokenizedText(tokens, len(without_surrogates(text).encode()))


def _measure_quality(tokenizer: Tokenizer, texts: Sequence[str], seen: bool) -> TokenizerQuality:
    tokens = text_bytes = unknown = lost = 0
    for text in texts:
        ids = tokenizer.encode(text)
        tokens += len(ids)
        text_bytes += len(text.encode())
        if tokenizer.unknown is not None:
            unknown += ids.count(tokenizer.unknown)
        if tokenizer.decode(ids) != text:
            lost += 1
    return TokenizerQuality(
        text_bytes=text_bytes,
        seen=seen,
        bytes_per_token=text_bytes / max(tokens, 1),
        unknown=unknown / max(tokens, 1),
        documents=len(texts),
        lost=lost,
    )
