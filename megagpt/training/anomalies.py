"""Detect updates with bad numbers and decide what to do about them, the same on every rank.

Decisions depend only on the run's metrics: its losses and gradient norms, and earlier decisions. A run that resumes or
rolls back replays them, and therefore decides the same.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megagpt.cluster import Collectives
from megagpt.config.recipe.sections import HealthSection
from megagpt.state import UpdateResult

MAX_FAILED_SAVES = 4  # consecutive
MAX_ROLLBACKS = 4  # without a checkpoint between them
_MAD_TO_STD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_MIN_DEVIATION = 1e-3  # as a fraction of the median, so that noise on a flat curve is not a spike


class ConsecutiveFailures:
    """Counts consecutive failures up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def add(self) -> bool:
        """Count one more failure. Returns whether the limit is reached."""
        self._count += 1
        return self._count >= self._limit

    def reset(self) -> None:
        """Start over after a success."""
        self._count = 0


class Action(Enum):
    """What to do about a bad update. The values are the names of the events in metrics.jsonl."""

    RETRY = "overflow"
    """The update was not applied: repeat it with the same data, at the lower fp16 loss scale."""
    SKIP = "skip"
    """The update was not applied: continue with the next data."""
    ROLL_BACK = "rollback"
    """Go back to a checkpoint, and leave out the data that led here."""


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with an update, and what to do about it."""

    reason: str
    action: Action


class Health:
    """Checks the numbers of each update, and keeps track of the data to leave out because it spoiled them."""

    def __init__(self, section: HealthSection) -> None:
        self._section = section
        self._reset()

    def replay(self, events: Sequence[dict[str, Any]], collectives: Collectives) -> None:
        """Rebuild the state from the events of rank 0. Collective.

        Args:
            events: `Metrics.replayable`; only rank 0's are used.
            collectives: the ranks.
        """
        self._reset()
        for event in collectives.all_gather_object(list(events))[0]:
            self.observe(**event)

    def observe(self, event: str, *, update: int, **values: Any) -> None:
        """Take an event of the run into account.

        Args:
            event: its kind, as in metrics.jsonl. Kinds that decide nothing are ignored.
            update: number of updates made before it, or with it.
            values: the event's values.
        """
        if event == "update":
            self._losses.append(values["loss"])
            self._norms.append(values["grad_norm"])
        elif event == "checkpoint":
            self.rollbacks = 0
        elif event in ("skip", "rollback"):
            self._left_out[values["position"]] = values["samples"]
            self._skips_at[update] += 1
        if event == "rollback":
            self.rollbacks += 1
            self._skips_at.clear()

    def next_position(self, position: int) -> int:
        """Return the first data position at or after `position` that is not left out."""
        while position in self._left_out:
            position += self._left_out[position]
        return position

    def accepts(self, loss: float) -> bool:
        """Return whether an update with this loss may be applied."""
        return self._loss_problem(loss) is None

    def check(self, update: int, result: UpdateResult) -> Anomaly | None:
        """Return what is wrong with an update, or None.

        Args:
            update: number of updates made before it.
            result: its numbers.
        """
        if result.made:
            spike = _spike("gradient norm", result.grad_norm, self._norms, self._section.norm_spike)
            return Anomaly(spike, Action.ROLL_BACK) if spike else None
        reason = self._loss_problem(result.loss)
        if reason is None and result.scale is not None:
            return Anomaly(f"the gradient overflows at loss scale {result.scale.value:g}", Action.RETRY)
        may_skip = self._skips_at[update] < self._section.skips
        return Anomaly(reason or "the gradient is not finite", Action.SKIP if may_skip else Action.ROLL_BACK)

    def _loss_problem(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return _spike("loss", loss, self._losses, self._section.loss_spike)

    def _reset(self) -> None:
        self.rollbacks = 0  # since the last checkpoint
        self._losses: deque[float] = deque(maxlen=self._section.window)
        self._norms: deque[float] = deque(maxlen=self._section.window)
        self._left_out: dict[int, int] = {}  # data position → number of samples to leave out from there
        self._skips_at: Counter[int] = Counter()  # updates made → skips since then, or since the last rollback


def _spike(what: str, value: float, recent: deque[float], limit: float | None) -> str | None:
    """Return why a value is a spike compared with recent ones, or None.

    The distance from the median is measured in median absolute deviations. Neither is moved by a spike in the window.
    A falling curve has a large deviation and its newest values lie below the median, so it is no spike.
    """
    if limit is None or len(recent) < (recent.maxlen or 0):
        return None
    median = statistics.median(recent)
    spread = _MAD_TO_STD * statistics.median(abs(other - median) for other in recent)
    deviation = max(spread, _MIN_DEVIATION * abs(median))
    if value <= median + limit * deviation:
        return None
    distance = (value - median) / deviation if deviation else math.inf
    return (
        f"the {what} is {value:.6g}, {distance:.1f} deviations above {median:.6g}, the median of {len(recent)} updates"
    )
