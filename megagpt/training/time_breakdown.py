"""Effective training time: where a run's seconds went, by its metrics alone, all its restarts together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megagpt.training.console import duration


@dataclass(frozen=True)
class Times:
    """Seconds of a run, on rank 0. The time between two of its processes is not among them.

    `data`: waiting for batches. `compute`: the rest of each update. `save`: training stood still for a checkpoint.
    `evaluate`: validations and samples. `restart`: from each process's start to its first update. `lost`: updates
    that were made again after a restart or roll-back, and what was done beside them, and the way back.
    """

    data: float = 0.0
    compute: float = 0.0
    save: float = 0.0
    evaluate: float = 0.0
    restart: float = 0.0
    lost: float = 0.0

    @property
    def total(self) -> float:
        """All seconds together."""
        return float(sum(asdict(self).values()))

    @property
    def shares(self) -> dict[str, float]:
        """Each part of the total; they sum to 1."""
        return {name: seconds / self.total if self.total else 0.0 for name, seconds in asdict(self).items()}

    def __add__(self, other: Times) -> Times:
        return Times(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def __str__(self) -> str:
        parts = sorted(self.shares.items(), key=lambda item: -item[1])
        named = ", ".join(f"{'lost work' if name == 'lost' else name} {share:.1%}" for name, share in parts)
        return f"{duration(self.total)}: {named}"


def process_age() -> float:
    """Seconds since this process was started, all its imports included (proc(5): field 22 of stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def of(events: Iterable[Mapping[str, Any]]) -> Times:
    """What the events of metrics.jsonl add up to."""
    return sum(map(_one, events), Times())


def _one(event: Mapping[str, Any]) -> Times:
    seconds, lost = event.get("seconds", 0.0), event.get("lost_seconds", 0.0)
    kind, data = event["event"], event.get("data_seconds", 0.0)
    if kind == "update":
        return Times(data=data, compute=seconds - data)
    if kind in ("checkpoint", "save_failed"):
        return Times(save=event.get("stall_seconds", seconds))
    if kind in ("validation", "validation_left"):
        return Times(evaluate=seconds)
    if kind in ("start", "branch", "resume"):
        return Times(restart=seconds, lost=lost)
    return Times(lost=seconds + lost) if kind in ("skip", "overflow", "rollback") else Times()
