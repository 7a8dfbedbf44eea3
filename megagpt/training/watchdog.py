"""Watchdog that detects ranks that hang and reports ranks that have died.

Each rank records its current phase in logs/rank-N.heartbeat, and a thread compares the duration of the phase with a
limit. The first rank that exceeds the limit reports which rank is furthest behind and which hosts do not answer. It
requests all ranks to write their stacks to their logs, and exits. The launcher then ends the other ranks. In the first
updates, which may compile kernels for minutes, a hang is reported as early as in other updates, but the rank exits
later. When a rank dies, the collectives of the other ranks fail. training/loop.py catches that error, and `Watch.gone`
determines from the heartbeats which ranks have died.
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
from types import TracebackType

from megagpt.cluster import reachability
from megagpt.cluster.preflight import RankLocation
from megagpt.errors import EXIT_FAILURE
from megagpt.files import parse_json

# Phases of an update. The phase STEP includes the last backward pass.
DATA, PASSES, STEP = "data", "forward/backward", "step"
EVALUATE, SAVE, SAMPLE = "evaluate", "save", "sample"
# Number of first updates with a longer limit, because they may compile kernels.
_EXEMPT = 2
# Seconds without a heartbeat after which a rank counts as dead. Heartbeats are written every second.
_GONE = 3.0
# Seconds to wait until all ranks have written their stacks. Each rank checks for the request once per second.
_REQUEST_SECONDS = 2.5
# File in the log folder with which a rank requests the stacks. When the file changes, each rank writes its stacks.
_REQUEST = "stacks-requested"
# Factor of the limit for phases that may legitimately be slow (saving, sampling, and the first use of a kernel).
_LONGER = 10


class Watch:
    """Watchdog of this rank, which records the current phase and ends the process if the phase lasts too long.

    The limit is max(`seconds`, 5 × the median of the last 50 durations of the phase). For a save, a sample, the first
    updates and the first batch of an evaluation, the limit is at least ten times `seconds`. There is no limit before
    the first forward pass. An evaluation enters its phase again for each batch. If a phase of the first updates lasts
    longer than max(`seconds`, 5 × the longest earlier phase), this is reported once, and the rank continues to wait.

    Args:
        folder: folder with the heartbeats and logs of all ranks.
        rank: this rank.
        hosts: the host of each rank.
        seconds: lower bound of the limit in seconds.
        alarm: function that is called with a message before the process is ended.
        warn: function that is called with a message if the rank continues to wait.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        hosts: Sequence[RankLocation],
        seconds: float,
        alarm: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._hosts = hosts
        self._seconds = seconds
        self._alarm = alarm
        self._warn = warn
        self._warned = False
        self._stacks_written_at = time.time()
        self._phase = "build"
        self._update = 0
        self._since = time.monotonic()
        self._updates_seen = 0
        self._longest = 0.0
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=50))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        """Start the thread of the watchdog."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread of the watchdog, and remove this rank's heartbeat file."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self._rank).unlink()

    def enter(self, phase: str, update: int) -> None:
        """Record that this rank enters a phase of an update. Each call counts as progress."""
        now = time.monotonic()
        self._durations[self._phase].append(now - self._since)
        self._longest = max(self._longest, now - self._since)
        self._phase, self._update, self._since = phase, update, now
        self._updates_seen += phase == PASSES

    @property
    def doing(self) -> str:
        """Description of the phase that this rank is in."""
        return f"{self._phase} of update {self._update}"

    def gone(self) -> list[str]:
        """Return a line for each host that does not answer and for each rank that has died.

        This first waits for a few seconds, because the last heartbeat of a rank that has just died is still recent.
        """
        time.sleep(_GONE + 1)
        return [*self._unanswering(), *(line for line, silent in self._beats(_GONE) if silent)]

    def _run(self) -> None:
        while True:
            lasted = time.monotonic() - self._since
            beat = {"update": self._update, "phase": self._phase, "lasted": lasted, "at": time.time()}
            with contextlib.suppress(OSError):
                self._write_heartbeat(json.dumps(beat))
            self._write_requested_stacks()
            if self._updates_seen and lasted > self._limit():
                self._give_up(lasted)
            if self._is_first() and not self._warned and lasted > max(self._seconds, 5 * self._longest):
                self._report_early(lasted)
            if self._end.wait(min(1.0, self._seconds / 5)):
                return

    def _write_heartbeat(self, text: str) -> None:
        """Replace this rank's heartbeat file atomically, so that other ranks never read an empty file."""
        path = self._file(self._rank)
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(text)
        os.replace(temporary, path)

    def _limit(self) -> float:
        measured = list(self._durations[self._phase])
        # A phase without earlier durations, such as the first batch of an evaluation, may still compile kernels.
        quick = measured and self._updates_seen > _EXEMPT and self._phase in (DATA, PASSES, STEP, EVALUATE)
        least = self._seconds if quick else _LONGER * self._seconds
        return max(least, 5 * statistics.median(measured)) if measured else least

    def _is_first(self) -> bool:
        """Return whether this rank is in one of the first updates, which have a longer limit."""
        return self._updates_seen <= _EXEMPT and self._phase in (DATA, PASSES, STEP)

    def _give_up(self, lasted: float) -> None:
        self._request_stacks()
        self._alarm(self._findings(lasted))
        time.sleep(_REQUEST_SECONDS)  # the launcher ends the other ranks as soon as this one ends
        os._exit(EXIT_FAILURE)

    def _report_early(self, lasted: float) -> None:
        """Report a hang in the first updates, unless another rank has already done so, and request all stacks."""
        self._warned = True
        if self._stacks_requested():
            return
        self._request_stacks()
        self._warn(
            f"{self._findings(lasted)}\n  stacks of all ranks: {self._folder}/rank-*.log. "
            f"The first updates may compile; the run ends after {self._limit():.0f} s without progress"
        )

    def _findings(self, lasted: float) -> str:
        """Return a message about the phase in which this rank hangs, and about the state of all ranks and hosts."""
        lines = [*self._unanswering(), *(line for line, _ in self._beats(self._seconds / 2))]
        return (
            f"megagpt: {self._called(self._rank)} has made no progress for {lasted:.0f} s, "
            f"in phase {self._phase} of update {self._update}\n" + "\n".join(lines)
        )

    def _request_stacks(self) -> None:
        """Write this rank's stacks to its log, and request the stacks of all ranks that share the run directory."""
        with contextlib.suppress(OSError):
            (self._folder / _REQUEST).write_text(f"{self._called(self._rank)}, {self.doing}\n")
        self._write_stacks()

    def _stacks_requested(self) -> bool:
        """Return whether any rank has requested stacks since this rank last wrote its own."""
        with contextlib.suppress(OSError):
            return (self._folder / _REQUEST).stat().st_mtime > self._stacks_written_at
        return False

    def _write_requested_stacks(self) -> None:
        if self._stacks_requested():
            self._warned |= self._is_first()  # the rank that requested the stacks reports the hang
            self._write_stacks()

    def _write_stacks(self) -> None:
        self._stacks_written_at = time.time()
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.heartbeat"

    def _called(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank].name}"

    def _unanswering(self) -> list[str]:
        """Return a line for each other host that does not answer."""
        here = self._hosts[self._rank].address
        names = {host.address: host.name for host in self._hosts if host.address != here}
        return [
            f"  host {names[address]} ({address}) does not answer: its network is cut, or it is down"
            for address in reachability.unreachable_addresses(list(names))
        ]

    def _beats(self, seconds: float) -> list[tuple[str, bool]]:
        """Return a line for each rank, and whether its last heartbeat is older than `seconds`.

        Silent ranks come first, and then the rank that is furthest behind. Ranks whose heartbeats cannot be read, for
        example because they are on another disk, are omitted.
        """
        rows = []
        for rank in range(len(self._hosts)):
            try:
                beat = parse_json(self._file(rank).read_text())
                silent = time.time() - beat["at"]
            except (OSError, ValueError, TypeError, KeyError):
                continue
            silence = f"  silent for {silent:.0f} s: stopped or dead" if silent > seconds else ""
            line = f"  {self._called(rank)}: {beat['phase']} of update {beat['update']}{silence}"
            rows.append((not silence, beat["update"], line))
        return [(line, not alive) for alive, _, line in sorted(rows)]
