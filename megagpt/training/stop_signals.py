"""Stopping early on a signal or at a time limit: the same verdict on every rank, in the same update."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from megagpt.state import Verdict

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: a terminal was closed
REQUEST = "STOP"  # a file of this name in the run directory asks to stop
T = TypeVar("T")
_SAME = 5.0  # seconds: a terminal and a launcher both pass on one Ctrl-C, which is one request, not two


class Stopping:
    """Notes the first signal and the time limit; a second signal, later, ends the process at once.

    A `request` may lie there before the run does: a job script's signal may come while the ranks still start.
    `tell` says at once that a signal was heard; where nohup has SIGHUP ignored, it stays so.
    """

    def __init__(
        self,
        max_minutes: float | None,
        any_rank: Callable[..., list[bool]],
        request: Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._any_rank, self._request, self._tell = any_rank, request, tell
        self._end = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
        self._reason: str | None = None
        self._noted_at = 0.0
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._old = {number: signal.signal(number, self._note) for number in _SIGNALS if number not in ignored}

    def verdict(self, writing: bool = False, limited: bool = True) -> Verdict:
        """Whether to stop, and whether any rank is `writing`; asks all ranks, so all must call it.

        The time limit stops only what is `limited`.
        """
        if limited and self._reason is None and self._end is not None and time.monotonic() >= self._end:
            self._reason = "the time limit"
        if self._reason is None and self._request is not None and self._request.exists():
            self._reason = "megagpt stop"
        stop, writing = self._any_rank(self._reason is not None, writing)
        return Verdict((self._reason or "a signal to another rank") if stop else None, writing)

    def close(self) -> None:
        """Give the signals back. A request has been heard, and is not one to the run that goes on."""
        if self._request is not None:
            self._request.unlink(missing_ok=True)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted_at and time.monotonic() > self._noted_at + _SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        name = signal.Signals(number).name
        if not self._noted_at and self._tell is not None:
            self._tell(
                f"\n{name}: this update is finished and saved first; once more, after {_SAME:.0f} s, ends at once"
            )
        self._noted_at = self._noted_at or time.monotonic()
        self._reason = self._reason or f"signal {name}"


class Asking:
    """Lets items through until `asked`, called before each, says why to stop; from then on `reason` holds it."""

    def __init__(self, asked: Callable[[], str | None]) -> None:
        self._asked = asked
        self.reason: str | None = None

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The items before the stop."""
        for item in items:
            self.reason = self.reason or self._asked()
            if self.reason:
                return
            yield item
