"""Console output of a run. Rank 0 prints lines to the terminal, and all other output goes to logs/rank-N.log.

Output never ends a run. If the terminal is closed, the disk is full, or a line cannot be formatted or displayed, only
the line is lost. Callers guard code that formats output with `display_only`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megagpt import files
from megagpt.errors import without_controls
from megagpt.state import TrainState, UpdateResult


@contextlib.contextmanager
def display_only() -> Iterator[None]:
    """Return a context that logs any exception instead of raising it, for code that only formats and prints."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # writing to the log may also fail
            traceback.print_exc()


class Console:
    """Context manager that redirects the output of a training process to the rank's log file.

    This affects all output to file descriptors 1 and 2, including that of C libraries. Only `alarm`, and `say` on rank
    0, write to the original console.

    Args:
        run: the run directory.
        rank: this rank.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.log_path = run / "logs" / f"rank-{rank}.log"
        self._run = run
        self._main = rank == 0
        self._original: tuple[int, int] | None = None  # file descriptors of the original stdout and stderr
        self._out: TextIO | None = None
        # Python's output streams, with the encodings and error handlers to restore.
        self._encodings: list[tuple[io.TextIOWrapper, str, str | None]] = []

    def __enter__(self) -> Console:
        """Redirect file descriptors 1 and 2.

        Raises:
            UserError: The run directory cannot be made, or contains a link that leads out of it.
        """
        files.make_run_folder(self._run)
        files.refuse_links_out(self._run)
        files.make_run_folder(self.log_path.parent)
        sys.stdout.flush()
        sys.stderr.flush()
        log = files.open_to_append(self.log_path)
        self._original = (os.dup(1), os.dup(2))
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                self._encodings.append((stream, stream.encoding, stream.errors))
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # logs are UTF-8 in every locale
        logging.basicConfig(
            level=logging.INFO,
            stream=sys.stderr,
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
            force=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore file descriptors 1 and 2."""
        if self._original is None or self._out is None:
            return
        with display_only():
            sys.stdout.flush()
            sys.stderr.flush()
        for stream, encoding, errors in self._encodings:
            with display_only():
                stream.reconfigure(encoding=encoding, errors=errors)
        for number, original in zip((1, 2), self._original, strict=True):
            os.dup2(original, number)
            os.close(original)
        with contextlib.suppress(OSError):
            self._out.close()
        self._original = None
        self._out = None
        self._encodings = []

    def say(self, text: str = "") -> None:
        """Print a line to the console on rank 0, and write it to the log on every rank. Never raises."""
        with display_only():
            text = without_controls(text, colours=True)
        with contextlib.suppress(OSError, ValueError):  # the terminal or the other end of the pipe may be closed
            if self._main and self._out is not None:
                self._out.write(text + "\n")
                self._out.flush()
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            print(text, flush=True)

    def alarm(self, text: str) -> None:
        """Print to the original stderr immediately, on any rank. Never raises, even in a signal handler."""
        descriptor = 2 if self._original is None else self._original[1]
        with contextlib.suppress(OSError):
            os.write(descriptor, f"{text}\n".encode(errors="replace"))


class Progress:
    """Formatter of the line for each logged update, which also measures the speed since the previous line."""

    def __init__(self, total: int, tokens_per_update: int) -> None:
        self.data_seconds = 0.0  # time for which the current update had to wait for its batches
        self._total = total
        self._tokens_per_update = tokens_per_update
        self._width = len(str(total))
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._updates = 0

    def end_update(self) -> float:
        """Record the end of an update. Returns its duration in seconds, without the time that `exclude` excluded."""
        seconds = self.exclude()
        self._seconds += seconds
        self._updates += 1
        return seconds

    def exclude(self) -> float:
        """Exclude the time since the last call of `exclude` or `end_update` from the speed, for example after a save.

        Returns that time in seconds.
        """
        now = time.perf_counter()
        seconds = now - self._start
        self._start = now
        return seconds

    def line(self, state: TrainState, result: UpdateResult) -> str:
        """Return a line with the update, loss, learning rate, gradient norm, tokens per second and remaining time."""
        speed = self._updates * self._tokens_per_update / max(self._seconds, 1e-9)
        remaining = (self._total - state.update) * self._tokens_per_update / max(speed, 1e-9)
        self._seconds = 0.0
        self._updates = 0
        return (
            f"{state.update:>{self._width}}/{self._total}"
            f"  loss {result.loss:7.4f}  lr {result.lr:.2e}  grad norm {result.grad_norm:6.3f}"
            f"  {speed:>11,.0f} tokens/s  ETA {duration(remaining)}"
        )


def duration(seconds: float) -> str:
    """Format a duration as text such as 42s, 3m07s, 5h12m or 2d04h, or as "unknown" if it is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
