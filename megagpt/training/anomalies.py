"""Failures and bad numbers: how many are borne, and what is done about them, the same on every rank.

What is decided depends on the record of the run alone: its losses and gradient norms, and what was decided before.
A resumed run, or one that has rolled back, reads it again, and so makes the same decisions.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megagpt.cluster import Agreement
from megagpt.config.recipe.sections import HealthSection
from megagpt.files import parse_json
from megagpt.state import UpdateResult

MOST_FAILED_SAVES = 4  # in a row
MOST_ROLLBACKS = 4  # without a checkpoint between them
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST = 1e-3  # deviation, as a share of the median: a flat curve's every wrinkle is no spike


class Row:
    """Counts failures in a row."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def add(self) -> bool:
        """Note one more; whether it is one too many."""
        self._count += 1
        return self._count >= self._most

    def end(self) -> None:
        """It went well: the row is over."""
        self._count = 0


class Remedy(Enum):
    """What is done about an update: it was not made and is made again, or its data is left out, or the run goes back
    to a checkpoint, too.
    """

    AGAIN = "overflow"
    SKIP = "skip"
    ROLL_BACK = "rollback"


@dataclass(frozen=True)
class Finding:
    """What is wrong with an update, and the remedy."""

    reason: str
    remedy: Remedy


class Health:
    """Looks at each update's numbers, and leaves data out that has spoiled them."""

    def __init__(self, section: HealthSection) -> None:
        self._section = section
        self._forget()

    def recall(self, records: Sequence[dict[str, Any]], agreement: Agreement) -> None:
        """Take up a run where its record stands (`Metrics.decisive`), as rank 0 has it; collective."""
        self._forget()
        for record in parse_json(agreement.gather(json.dumps(records))[0]):
            self.note(**record)

    def note(self, event: str, *, update: int, **values: Any) -> None:
        """Learn of an event of the run, as it is recorded."""
        if event == "update":
            self._losses.append(values["loss"])
            self._norms.append(values["grad_norm"])
        elif event == "checkpoint":
            self.rollbacks = 0
        elif event in ("skip", "rollback"):
            self._left_out[values["position"]] = values["samples"]
            self._row[update] += 1
        if event == "rollback":
            self.rollbacks += 1
            self._row.clear()

    def start(self, position: int) -> int:
        """The data position to go on from: `position`, or the end of what is left out there."""
        while position in self._left_out:
            position += self._left_out[position]
        return position

    def accepts(self, loss: float) -> bool:
        """Whether an update with this loss may be made."""
        return self._against(loss) is None

    def judge(self, update: int, result: UpdateResult) -> Finding | None:
        """What is wrong with the update after `update` ones, or None."""
        if result.made:
            spike = _spike("gradient norm", result.grad_norm, self._norms, self._section.norm_spike)
            return Finding(spike, Remedy.ROLL_BACK) if spike else None
        reason = self._against(result.loss)
        if reason is None and result.scale is not None:
            return Finding(f"the gradient overflows at loss scale {result.scale.value:g}", Remedy.AGAIN)
        borne = self._row[update] < self._section.skips
        return Finding(reason or "the gradient is not finite", Remedy.SKIP if borne else Remedy.ROLL_BACK)

    def _against(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return _spike("loss", loss, self._losses, self._section.loss_spike)

    def _forget(self) -> None:
        self._losses: deque[float] = deque(maxlen=self._section.window)
        self._norms: deque[float] = deque(maxlen=self._section.window)
        self._left_out: dict[int, int] = {}  # data position → samples from there on
        self._row: Counter[int] = Counter()  # updates → skips since so many updates were made, or since going back
        self.rollbacks = 0  # since the last checkpoint


def _spike(what: str, value: float, recent: deque[float], limit: float | None) -> str | None:
    """Why a value is a spike over recent ones, or None.

    Measured from their median, in median absolute deviations: neither is moved by a spike among them, and a curve
    that falls is spread wide and lies below its median.
    """
    if limit is None or len(recent) < (recent.maxlen or 0):
        return None
    middle = statistics.median(recent)
    spread = max(_NORMAL * statistics.median(abs(other - middle) for other in recent), _LEAST * abs(middle))
    if value <= middle + limit * spread:
        return None
    off = (value - middle) / spread if spread else math.inf
    return f"the {what} is {value:.6g}, {off:.1f} deviations above {middle:.6g}, the median of {len(recent)} updates"
