"""How far `prepare` is: a live line on a terminal, now and then a plain line elsewhere, nothing when quick."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table

_SECONDS = 10.0  # between plain lines


class Progress:
    """Counts what was done since it began, of `total` bytes of input. This one shows nothing."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begin = time.monotonic()
        self._documents = self._tokens = self._text_bytes = self._input = 0

    def add(self, documents: int = 0, tokens: int = 0, text_bytes: int = 0, input_bytes: int = 0) -> None:
        """Count more; `input_bytes` are those of pieces that are done."""
        self._documents += documents
        self._tokens += tokens
        self._text_bytes += text_bytes
        self._input += input_bytes
        self.show()

    def show(self) -> None:
        """Show the state of things."""

    def share(self) -> float:
        """The share of the input that is done."""
        return self._input / self._total if self._total else 0.0

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-3)
        line = (
            f"{self._text_bytes / 1e6:,.0f} MB, {self._text_bytes / 1e6 / seconds:,.1f} MB/s, "
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens:,} tokens"
        )
        share = self.share()
        return line + (f", {100 * share:.0f} %, {_clock(seconds * (1 - share) / share)} to go" if share else "")


class _PlainProgress(Progress):
    """A plain line every ten seconds."""

    def __init__(self, total: int, out: TextIO) -> None:
        super().__init__(total)
        self._out, self._next = out, time.monotonic() + _SECONDS

    def show(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            self._out.write(f"prepare: {self}\n")
            self._out.flush()


@contextmanager
def show_progress(total: int, out: TextIO | None) -> Iterator[Progress]:
    """A progress over `total` bytes of input that is shown on `out`; None: not at all."""
    if out is None:
        yield Progress(total)
    elif not out.isatty():
        yield _PlainProgress(total, out)
    else:
        from rich.console import Console  # here, as it takes longer to load than a small corpus to prepare
        from rich.live import Live

        progress = Progress(total)
        console = Console(file=out)
        with Live(console=console, get_renderable=lambda: _bar(progress), refresh_per_second=5, transient=True):
            yield progress


def _bar(progress: Progress) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    row = Table.grid("", Column(no_wrap=True), padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=progress.share(), width=8), str(progress))
    return row


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
