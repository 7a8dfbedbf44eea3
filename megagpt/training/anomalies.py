"""Detect updates with a bad loss or gradient, and decide what to do about them.

The decisions are the same on every rank. They depend only on the run's metrics, namely losses, gradient norms and
earlier decisions. A run that resumes or rolls back replays these metrics, and therefore makes the same decisions.
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

# The run fails after this number of consecutive failed saves.
MAX_FAILED_SAVES = 4
# The run fails instead of rolling back this many times without a new checkpoint in between.
MAX_ROLLBACKS = 4
# Ratio of the standard deviation of a normal distribution to its median absolute deviation.
_MAD_TO_STD = 1.4826
# Lower bound of the deviation as a fraction of the median. It prevents noise on a flat curve from counting as a spike.
_MIN_DEVIATION = 1e-3


class ConsecutiveFailures:
    """Counter of consecutive failures with a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def add(self) -> bool:
        """Count a failure. Returns whether the limit is reached."""
        self._count += 1
        return self._count >= self._limit

    def reset(self) -> None:
        """Reset the counter to 0 after a success."""
        self._count = 0


class Action(Enum):
    """Reaction to a bad update. The values are the names of the events in metrics.jsonl."""

    RETRY = "overflow"
    """Repeat the update, which was not applied, with the same data at a lower fp16 loss scale."""
    SKIP = "skip"
    """Continue with the next data, without repeating the update, which was not applied."""
    ROLL_BACK = "rollback"
    """Go back to a checkpoint, and skip the data that led to the bad update."""


@dataclass(frozen=True)
class Anomaly:
    """Reason why an update is bad, and the action to take."""

    reason: str
    action: Action


class Health:
    """Monitor that checks the loss and gradient norm of each update, and keeps track of the data to skip."""

    def __init__(self, section: HealthSection) -> None:
        self._section = section
        self._reset()

    def replay(self, events: Sequence[dict[str, Any]], collectives: Collectives) -> None:
        """Rebuild the state from the events of rank 0. Collective.

        Args:
            events: events of `Metrics.replayable`. Only those of rank 0 are used.
            collectives: the collectives of the job.
        """
        self._reset()
        for event in collectives.all_gather_object(list(events))[0]:
            self.observe(**event)

    def observe(self, event: str, *, update: int, **values: Any) -> None:
        """Take an event of the run into account.

        Args:
            event: kind of the event, as in metrics.jsonl. Kinds that do not affect decisions are ignored.
            update: number of completed updates. For the event `update`, it includes that update.
            values: other values of the event.
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
        """Return the first data position at or after `position` that is not to be skipped."""
        while position in self._left_out:
            position += self._left_out[position]
        return position

    def accepts(self, loss: float) -> bool:
        """Return whether an update with this loss may be applied."""
        return self._loss_problem(loss) is None

    def check(self, update: int, result: UpdateResult) -> Anomaly | None:
        """Check the result of an update.

        Args:
            update: number of updates completed before this one.
            result: the result of the update.

        Returns:
            The anomaly, or None if there is none.
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
        self.rollbacks = 0  # number of rollbacks since the last checkpoint
        self._losses: deque[float] = deque(maxlen=self._section.window)
        self._norms: deque[float] = deque(maxlen=self._section.window)
        # Maps a data position to the number of samples to skip, starting at that position.
        self._left_out: dict[int, int] = {}
        # Maps a number of completed updates to the number of skips at that point, counted since the last rollback.
        self._skips_at: Counter[int] = Counter()


def _spike(what: str, value: float, recent: deque[float], limit: float | None) -> str | None:
    """Return the reason why a value counts as a spike compared with recent values, or None if it does not.

    The distance from the median is measured in units of the standard deviation, which is estimated by the median
    absolute deviation. A spike among the recent values affects neither of them. A decreasing curve does not trigger,
    because its newest values are below the median.
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
