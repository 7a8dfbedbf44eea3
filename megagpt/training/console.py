"""What a person sees of a run: rank 0's lines on the console, everything else in logs/rank-N.log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from megagpt import files
from megagpt.errors import without_controls
from megagpt.state import TrainState, UpdateResult


class Console:
    """Owns the console of a training process.

    From construction on, all that this process prints through file descriptors 1 and 2, libraries in C included,
    goes to the rank's log file. Only `say` writes to the real console, and only on rank 0.
    """

    def __init__(self, run: Path, rank: int) -> None:
        files.make_run_folder(run)
        files.refuse_links_out(run)
        path = run / "logs" / f"rank-{rank}.log"
        files.make_run_folder(path.parent)
        self._main, self.log_path = rank == 0, path
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = (os.dup(1), os.dup(2))
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        self.terminal = self._out.isatty()
        log = files.open_to_append(path)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        logging.basicConfig(
            level=logging.INFO,
            stream=sys.stderr,
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
            force=True,
        )

    def say(self, text: str = "") -> None:
        """Print a line on rank 0, and note it in the log of every rank."""
        text = without_controls(text, colours=True)
        if self._main:
            with contextlib.suppress(
                OSError
            ):  # a terminal that was closed, a pipe that nobody reads: neither is the end
                self._out.write(text + "\n")
                self._out.flush()
        with contextlib.suppress(OSError):  # a full disk takes no log, and is not the end
            print(text, flush=True)

    def alarm(self, text: str) -> None:
        """Print on the console's error stream at once, on whatever rank, also from a signal's handler."""
        with contextlib.suppress(OSError):
            os.write(self._saved[1], f"{text}\n".encode())

    def close(self) -> None:
        """Give file descriptors 1 and 2 back."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        with contextlib.suppress(OSError):
            self._out.close()


class Progress:
    """The aligned line per logged update, and the speed over the updates since the last one."""

    def __init__(self, total: int, tokens_per_update: int) -> None:
        self._total, self._per_update = total, tokens_per_update
        self._width = len(str(total))
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._updates = 0
        self.waited = 0.0  # seconds of the present update that went by before its batches were there

    def update(self) -> float:
        """Note that an update has ended; its seconds, without what ran since (`pause`)."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._seconds += seconds
        self._updates += 1
        return seconds

    def pause(self) -> float:
        """Leave what ran since the last update (evaluation, saving) out of the speed; its seconds."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    def line(self, state: TrainState, result: UpdateResult) -> str:
        """One line: update/total, loss, lr, grad norm, tokens per second, time left."""
        speed = self._updates * self._per_update / max(self._seconds, 1e-9)
        left = (self._total - state.update) * self._per_update / max(speed, 1e-9)
        self._seconds, self._updates = 0.0, 0
        return (
            f"{state.update:>{self._width}}/{self._total}"
            f"  loss {result.loss:7.4f}  lr {result.lr:.2e}  grad norm {result.grad_norm:6.3f}"
            f"  {speed:>11,.0f} tokens/s  ETA {duration(left)}"
        )


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m07s, 5h12m, 2d04h."""
    whole = round(seconds)
    for limit, (name, unit), (small, small_unit) in (
        (3600, ("m", 60), ("s", 1)),
        (86400, ("h", 3600), ("m", 60)),
        (float("inf"), ("d", 86400), ("h", 3600)),
    ):
        if whole < 60:
            return f"{whole}s"
        if whole < limit:
            return f"{whole // unit}{name}{whole % unit // small_unit:02d}{small}"
    raise AssertionError("unreachable: the last limit is infinite")
