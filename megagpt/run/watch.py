"""A hang is found by progress, not by a live process: each rank notes what it does, and a thread looks at the clock.

Every rank leaves what it is doing in logs/rank-N.heartbeat. When a rank makes no progress for too long, whichever
rank notices first names the rank that is furthest behind, writes all stacks to its log, and ends itself; the launcher
ends the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from megagpt.errors import EXIT_FAILURE

DATA, PASSES, STEP = "data", "forward/backward", "step"  # the last backward pass belongs to the step
EVALUATE, SAVE, SAMPLE = "evaluate", "save", "sample"
_EXEMPT = 2  # updates: the first ones compile and warm up, and have the longer limit
_LONGER = 10  # times the limit, for phases that wait for disks, or happen once: between two batches nothing does


class Watch:
    """Notes the phase of this rank, and ends the process when a phase lasts too long.

    The limit is max(`seconds`, 5 × the median of the phase's last 50 durations), in seconds; for a save, a sample or
    the first updates ten times `seconds` at least; building has none. An evaluation enters its phase again with each
    batch. `alarm` prints for people.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, alarm: Callable[[str], None]) -> None:
        self._folder, self._rank, self._seconds, self._alarm = folder, rank, seconds, alarm
        self._phase, self._update, self._since, self._seen = "build", 0, time.monotonic(), 0
        self._lasted: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=50))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, update: int) -> None:
        """This rank begins a phase of an update."""
        now = time.monotonic()
        self._lasted[self._phase].append(now - self._since)
        self._phase, self._update, self._since = phase, update, now
        self._seen += phase == PASSES

    @property
    def doing(self) -> str:
        """The phase that this rank is in."""
        return f"{self._phase} of update {self._update}"

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self._rank).unlink()

    def _run(self) -> None:
        while True:
            lasted = time.monotonic() - self._since
            beat = {"update": self._update, "phase": self._phase, "lasted": lasted, "at": time.time()}
            with contextlib.suppress(OSError):
                self._file(self._rank).write_text(json.dumps(beat))
            if self._seen and lasted > self._limit():
                self._give_up(lasted)
            if self._end.wait(min(1.0, self._seconds / 5)):
                return

    def _limit(self) -> float:
        measured = list(self._lasted[self._phase])
        quick = self._seen > _EXEMPT and self._phase in (DATA, PASSES, STEP, EVALUATE)
        least = self._seconds if quick else _LONGER * self._seconds
        return max(least, 5 * statistics.median(measured)) if measured else least

    def _give_up(self, lasted: float) -> None:
        others = {int(path.stem.partition("-")[2]): path for path in self._folder.glob("rank-*.heartbeat")}
        self._alarm(
            f"megagpt: rank {self._rank} has made no progress for {lasted:.0f} s, "
            f"in phase {self._phase} of update {self._update}\n" + "\n".join(_beats(others, self._seconds))
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_FAILURE)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.heartbeat"


def _beats(files: dict[int, Path], seconds: float) -> list[str]:
    """A line for each rank, the one furthest behind first: a rank whose own watch is silent is stopped or gone."""
    rows = []
    for rank, path in files.items():
        try:
            beat = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        silent = time.time() - beat["at"]
        word = f"  silent for {silent:.0f} s: stopped or dead" if silent > seconds / 2 else ""
        rows.append((not word, beat["update"], f"  rank {rank}: {beat['phase']} of update {beat['update']}{word}"))
    return [text for *_, text in sorted(rows)]
