"""Progress of `prepare`, shown as a live line on a terminal, or as a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table

_SECONDS = 10.0  # seconds between two plain lines


class Progress:
    """Counts the documents, tokens and bytes that have been processed. This base class does not show them."""

    def __init__(self, total: int) -> None:
        """Start counting.

        Args:
            total: The total number of bytes of input to process.
        """
        self._total = total
        self._begin = time.monotonic()
        self._documents = self._tokens = self._text_bytes = self._input_bytes = 0

    def add(self, documents: int = 0, tokens: int = 0, text_bytes: int = 0, input_bytes: int = 0) -> None:
        """Add to the counts.

        Args:
            documents: The number of documents to add.
            tokens: The number of tokens to add.
            text_bytes: The number of bytes of text to add.
            input_bytes: The number of bytes of input in completed chunks to add.
        """
        self._documents += documents
        self._tokens += tokens
        self._text_bytes += text_bytes
        self._input_bytes += input_bytes
        self.show()

    def show(self) -> None:
        """Show the counts. The base class does nothing."""

    def fraction(self) -> float:
        """Return the fraction of the input that has been processed."""
        return self._input_bytes / self._total if self._total else 0.0

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-3)
        line = (
            f"{self._text_bytes / 1e6:,.0f} MB, {self._text_bytes / 1e6 / seconds:,.1f} MB/s, "
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens:,} tokens"
        )
        fraction = self.fraction()
        if fraction:
            line += f", {fraction:.0%}, {_format_time(seconds * (1 - fraction) / fraction)} remaining"
        return line


class _PlainProgress(Progress):
    """Progress that writes a plain line every ten seconds."""

    def __init__(self, total: int, out: TextIO) -> None:
        super().__init__(total)
        self._out = out
        self._next = time.monotonic() + _SECONDS

    def show(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            self._out.write(f"prepare: {self}\n")
            self._out.flush()


@contextmanager
def show_progress(total: int, out: TextIO | None) -> Iterator[Progress]:
    """Show progress for the duration of the `with` block.

    Args:
        total: The total number of bytes of input to process.
        out: The stream to which progress is written. If None, no progress is shown.

    Yields:
        The counts, to which the caller adds.
    """
    if out is None:
        yield Progress(total)
    elif not out.isatty():
        yield _PlainProgress(total, out)
    else:
        # These are imported here because the import takes longer than preparing a small corpus.
        from rich.console import Console
        from rich.live import Live

        progress = Progress(total)
        console = Console(file=out)
        with Live(console=console, get_renderable=lambda: _bar(progress), refresh_per_second=5, transient=True):
            yield progress


def _bar(progress: Progress) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    row = Table.grid("", Column(no_wrap=True), padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=progress.fraction(), width=8), str(progress))
    return row


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
