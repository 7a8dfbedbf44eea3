"""Time breakdown of a run over all its processes, computed from its metrics alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megagpt.training.console import duration

_RECORDED_AS = {"startup": "restart", "lost_work": "lost"}  # names in metrics.jsonl that differ from the attributes


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds that a run has spent on each purpose, on rank 0. Time between processes of the run is not included.

    Attributes:
        data: time of waiting for batches.
        compute: time of updates, except for waiting for batches.
        save: time for which checkpoints have blocked training.
        evaluate: time of validations and samples.
        startup: time from the start of each process to its first update.
        lost_work: time of updates, saves and evaluations that a restart or rollback discarded, of updates that were not
            applied, and of rollbacks themselves.
    """

    data: float = 0.0
    compute: float = 0.0
    save: float = 0.0
    evaluate: float = 0.0
    startup: float = 0.0
    lost_work: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts in seconds."""
        return float(sum(asdict(self).values()))

    @property
    def fractions(self) -> dict[str, float]:
        """Each part as a fraction of the total. The fractions sum to 1, unless the total is 0."""
        return {name: seconds / self.total if self.total else 0.0 for name, seconds in asdict(self).items()}

    def record(self) -> dict[str, dict[str, float]]:
        """Return the values of the `time` event for metrics.jsonl."""
        return {
            key: {_RECORDED_AS.get(name, name): value for name, value in values.items()}
            for key, values in (("spent", asdict(self)), ("shares", self.fractions))
        }

    def __add__(self, other: TimeBreakdown) -> TimeBreakdown:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return TimeBreakdown(**sums)

    def __str__(self) -> str:
        parts = sorted(self.fractions.items(), key=lambda item: -item[1])
        named = ", ".join(f"{name.replace('_', ' ')} {fraction:.1%}" for name, fraction in parts)
        return f"{duration(self.total)}: {named}"


def process_age() -> float:
    """Return the seconds since this process was started, including the time of all imports.

    The start time of the process is field 22 of /proc/self/stat (see proc(5)).
    """
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK")


def add_up(events: Iterable[Mapping[str, Any]]) -> TimeBreakdown:
    """Return the total time breakdown of the given events of metrics.jsonl."""
    return sum(map(_of_event, events), TimeBreakdown())


def _of_event(event: Mapping[str, Any]) -> TimeBreakdown:
    kind = event["event"]
    seconds = event.get("seconds", 0.0)
    lost = event.get("lost_seconds", 0.0)
    if kind == "update":
        waiting = event.get("data_seconds", 0.0)
        return TimeBreakdown(data=waiting, compute=seconds - waiting)
    if kind in ("checkpoint", "save_failed"):
        return TimeBreakdown(save=event.get("stall_seconds", seconds))
    if kind in ("validation", "validation_left"):
        return TimeBreakdown(evaluate=seconds)
    if kind in ("start", "branch", "resume"):
        return TimeBreakdown(startup=seconds, lost_work=lost)
    if kind in ("skip", "overflow", "rollback"):
        return TimeBreakdown(lost_work=seconds + lost)
    return TimeBreakdown()
