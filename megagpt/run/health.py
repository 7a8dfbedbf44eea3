"""Failures and bad numbers: how many are borne, and what is done about them, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megagpt.state import UpdateResult

MOST_FAILED_SAVES = 4  # in a row
MOST_ROLLBACKS = 4  # without a checkpoint between them


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


class Health:
    """Looks at each update's numbers, and leaves data out that has spoiled them.

    `windows` are the (data position, samples) that earlier rollbacks of this run have left out. The numbers are the
    same on every rank, and so is what follows from them.
    """

    def __init__(self, windows: Iterable[tuple[int, int]], scaled: bool) -> None:
        self._skipped = dict(windows)
        self._scaled = scaled  # fp16's loss scale makes infinite gradients on purpose, and DeepSpeed passes over them
        self._rollbacks = Row(MOST_ROLLBACKS)

    def start(self, position: int) -> int:
        """The data position to go on from: `position`, or the end of what is left out there."""
        while position in self._skipped:
            position += self._skipped[position]
        return position

    def judge(self, result: UpdateResult) -> str | None:
        """What is wrong with an update's numbers, or None."""
        if not math.isfinite(result.loss):
            return f"the loss is {result.loss}"
        if not self._scaled and not math.isfinite(result.grad_norm):
            return f"the gradient norm is {result.grad_norm}"
        return None

    def leave_out(self, position: int, samples: int) -> bool:
        """Leave out what begins at a data position from now on; whether that was once too often in a row."""
        self._skipped[position] = samples
        return self._rollbacks.add()

    def saved(self) -> None:
        """A checkpoint was published: what came before it was good."""
        self._rollbacks.end()
