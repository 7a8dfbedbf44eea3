"""A hang is found by progress, not by a live process: each rank notes what it does, and a thread looks at the clock.

Every rank leaves what it is doing in logs/rank-N.heartbeat. When a rank makes no progress for too long, whichever
rank notices first names the rank that is furthest behind and the hosts that do not answer, writes all stacks to its
log, and ends itself; the launcher ends the others.
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
from collections.abc import Callable, Sequence
from pathlib import Path

from megagpt.distributed import reach
from megagpt.distributed.promise import Host
from megagpt.errors import EXIT_FAILURE
from megagpt.files import parse_json

DATA, PASSES, STEP = "data", "forward/backward", "step"  # the last backward pass belongs to the step
EVALUATE, SAVE, SAMPLE = "evaluate", "save", "sample"
_EXEMPT = 2  # updates: the first ones compile and warm up, and have the longer limit
_GONE = 3.0  # seconds without a sign of life, of which there is one a second
_LONGER = 10  # times the limit, for phases that wait for disks, or happen once: between two batches nothing does


class Watch:
    """Notes the phase of this rank, and ends the process when a phase lasts too long.

    The limit is max(`seconds`, 5 × the median of the phase's last 50 durations), in seconds; for a save, a sample, the
    first updates or the first batch of an evaluation ten times `seconds` at least; building has none. An evaluation
    enters its phase again with each batch. `hosts` says where each rank is; `alarm` prints for people.
    """

    def __init__(
        self, folder: Path, rank: int, hosts: Sequence[Host], seconds: float, alarm: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._hosts, self._seconds, self._alarm = folder, rank, hosts, seconds, alarm
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

    def gone(self) -> list[str]:
        """A line for each host that does not answer, and each rank that has ended without closing its watch.

        Takes some seconds: whoever has ended was alive a moment ago.
        """
        time.sleep(_GONE + 1)
        return [*self._unanswering(), *(line for line, silent in self._beats(_GONE) if silent)]

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
        # where nothing is measured yet, as in the first batch of an evaluation, kernels may still be compiled
        quick = measured and self._seen > _EXEMPT and self._phase in (DATA, PASSES, STEP, EVALUATE)
        least = self._seconds if quick else _LONGER * self._seconds
        return max(least, 5 * statistics.median(measured)) if measured else least

    def _give_up(self, lasted: float) -> None:
        lines = [*self._unanswering(), *(line for line, _ in self._beats(self._seconds / 2))]
        self._alarm(
            f"megagpt: {self._called(self._rank)} has made no progress for {lasted:.0f} s, "
            f"in phase {self._phase} of update {self._update}\n" + "\n".join(lines)
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_FAILURE)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.heartbeat"

    def _called(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank].name}"

    def _unanswering(self) -> list[str]:
        """A line for each other host that does not answer."""
        here = self._hosts[self._rank].address
        names = {host.address: host.name for host in self._hosts if host.address != here}
        return [
            f"  host {names[address]} ({address}) does not answer: its network is cut, or it is down"
            for address in reach.silent(list(names))
        ]

    def _beats(self, seconds: float) -> list[tuple[str, bool]]:
        """A line for each rank, and whether it is silent for so long, as one is that is stopped or gone.

        The one furthest behind comes first. Of a rank that writes to another disk nothing is known.
        """
        rows = []
        for rank in range(len(self._hosts)):
            try:
                beat = parse_json(self._file(rank).read_text())
                silent = time.time() - beat["at"]
            except (OSError, ValueError, TypeError, KeyError):
                continue
            word = f"  silent for {silent:.0f} s: stopped or dead" if silent > seconds else ""
            line = f"  {self._called(rank)}: {beat['phase']} of update {beat['update']}{word}"
            rows.append((not word, beat["update"], line))
        return [(line, not alive) for alive, _, line in sorted(rows)]
