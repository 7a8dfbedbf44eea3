"""Watchdog: detects a rank that hangs, and names ranks that have died.

Each rank records its current phase in logs/rank-N.heartbeat, and a thread compares the duration of the phase with a
limit. When a rank makes no progress for too long, the rank that notices first names the rank that is furthest behind
and the hosts that do not answer, has every rank write its stacks to its log, and exits. The launcher then ends the
other ranks. The first updates may compile kernels for minutes, so a rank without progress there is named as early as
in other updates, but ended later. A rank that dies makes the collectives of the others fail: training/loop.py catches
that error, and `Watch.gone` finds from the heartbeats which ranks have died.
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

DATA, PASSES, STEP = "data", "forward/backward", "step"  # the last backward pass belongs to the step
EVALUATE, SAVE, SAMPLE = "evaluate", "save", "sample"
_EXEMPT = 2  # first updates, which may compile kernels and therefore have the longer limit
_GONE = 3.0  # seconds without a heartbeat after which a rank counts as dead; heartbeats are written every second
_REQUEST_SECONDS = 2.5  # until all ranks have noticed the request; they check once per second
_REQUEST = "stacks-requested"  # file in the log folder; when it changes, each rank writes its stacks to its log
_LONGER = 10  # multiplier of the limit for phases that may legitimately be slow (saving, sampling, first use)


class Watch:
    """Records the phase of this rank, and ends the process when a phase lasts too long.

    The limit is max(`seconds`, 5 × the median of the phase's last 50 durations). For a save, a sample, the first
    updates and the first batch of an evaluation it is at least ten times `seconds`. Building has no limit. An
    evaluation enters its phase again for each batch. In the first updates, a phase that lasts longer than
    max(`seconds`, 5 × the longest phase before it) is reported once, and the rank continues to wait.

    Args:
        folder: where heartbeats and logs of the run's ranks are.
        rank: this rank.
        hosts: the host of each rank.
        seconds: lower bound of the limit, in seconds.
        alarm: called with a message before this rank is ended.
        warn: called with a message while this rank continues to wait.
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
        """Start to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, and remove this rank's heartbeat."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self._rank).unlink()

    def enter(self, phase: str, update: int) -> None:
        """Record that this rank begins a phase of an update, which counts as progress."""
        now = time.monotonic()
        self._durations[self._phase].append(now - self._since)
        self._longest = max(self._longest, now - self._since)
        self._phase, self._update, self._since = phase, update, now
        self._updates_seen += phase == PASSES

    @property
    def doing(self) -> str:
        """The phase that this rank is in."""
        return f"{self._phase} of update {self._update}"

    def gone(self) -> list[str]:
        """Return a line for each host that does not answer, and each rank that has died.

        Waits some seconds first, because the last heartbeat of a rank that has just died is still recent.
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
        """Replace this rank's heartbeat in one step: another rank that reads it must not find an empty file."""
        path = self._file(self._rank)
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(text)
        os.replace(temporary, path)

    def _limit(self) -> float:
        measured = list(self._durations[self._phase])
        # before anything is measured, as in the first batch of an evaluation, kernels may still be compiled
        quick = measured and self._updates_seen > _EXEMPT and self._phase in (DATA, PASSES, STEP, EVALUATE)
        least = self._seconds if quick else _LONGER * self._seconds
        return max(least, 5 * statistics.median(measured)) if measured else least

    def _is_first(self) -> bool:
        """Whether this rank is in one of the first updates, whose limit is longer."""
        return self._updates_seen <= _EXEMPT and self._phase in (DATA, PASSES, STEP)

    def _give_up(self, lasted: float) -> None:
        self._request_stacks()
        self._alarm(self._findings(lasted))
        time.sleep(_REQUEST_SECONDS)  # the launcher ends the other ranks as soon as this one ends
        os._exit(EXIT_FAILURE)

    def _report_early(self, lasted: float) -> None:
        """Report a hang in the first updates, unless another rank already has. All ranks write their stacks."""
        self._warned = True
        if self._stacks_requested():
            return
        self._request_stacks()
        self._warn(
            f"{self._findings(lasted)}\n  stacks of all ranks: {self._folder}/rank-*.log. "
            f"The first updates may compile; the run ends after {self._limit():.0f} s without progress"
        )

    def _findings(self, lasted: float) -> str:
        """Describe which rank makes no progress, in which phase, and the state of the other ranks and hosts."""
        lines = [*self._unanswering(), *(line for line, _ in self._beats(self._seconds / 2))]
        return (
            f"megagpt: {self._called(self._rank)} has made no progress for {lasted:.0f} s, "
            f"in phase {self._phase} of update {self._update}\n" + "\n".join(lines)
        )

    def _request_stacks(self) -> None:
        """Write this rank's stacks to its log, and request the same of all ranks that share the run directory."""
        with contextlib.suppress(OSError):
            (self._folder / _REQUEST).write_text(f"{self._called(self._rank)}, {self.doing}\n")
        self._write_stacks()

    def _stacks_requested(self) -> bool:
        """Whether any rank has requested stacks since this rank last wrote them."""
        with contextlib.suppress(OSError):
            return (self._folder / _REQUEST).stat().st_mtime > self._stacks_written_at
        return False

    def _write_requested_stacks(self) -> None:
        if self._stacks_requested():
            self._warned |= self._is_first()  # the rank that requested them reports
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
        """Return a line per rank, and whether its last heartbeat is older than `seconds`.

        The rank that is furthest behind comes first. Ranks whose heartbeats are on another disk are left out.
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
