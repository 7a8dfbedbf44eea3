"""Stop a run early because of a signal, the time limit or `megagpt stop`. All ranks stop after the same update."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from megagpt import files
from megagpt.training import status
from megagpt.training.status import STOP_FILE, RunStatus

# Signals that request a stop. The system sends SIGHUP when the terminal is closed.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Seconds after the first signal during which further signals are ignored. A single Ctrl-C reaches a rank twice, once
# from the terminal and once from the launcher.
_SAME_REQUEST = 5.0


class StopSignals:
    """Context manager that records requests to stop on this rank, and exchanges them with the other ranks.

    Signal handlers are installed between entry and exit. Under nohup, SIGHUP stays ignored. The first signal is only
    recorded. Further signals within a few seconds are ignored, because a launcher may repeat the first signal. Any
    later signal ends the process immediately.

    Args:
        max_minutes: time limit in minutes, counted from construction, or None for no limit.
        any_rank: collective function that returns whether its argument is true on at least one rank.
        stop_file: file that requests a stop, or None on ranks other than 0. It may already exist, because a job script
            can create it while the ranks are still starting.
        notify: function that the signal handler calls with a message when the first signal arrives.
    """

    def __init__(
        self,
        max_minutes: float | None,
        any_rank: Callable[[bool], bool],
        stop_file: Path | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.reason: str | None = None
        self._any_rank = any_rank
        self._stop_file = stop_file
        self._notify = notify
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
        self._request: str | None = None  # the source of the first request to stop on this rank
        self._signaled_at: float | None = None
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the signal handlers, and remove the stop file, so that it does not stop the next start of the run."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers = {}

    def agree(self, ignore_time_limit: bool = False) -> str | None:
        """Return whether a stop has been requested on any rank. Collective.

        Args:
            ignore_time_limit: whether to consider only signals and the stop file.

        Returns:
            The reason to stop, as text for the console, or None to continue. If there is a reason on any rank, every
            rank gets one. The reason is also stored in the attribute `reason`.
        """
        if self._request is None:
            self._request = self._find_request(ignore_time_limit)
        if self._any_rank(self._request is not None):
            self.reason = self._request or "a signal to another rank"
        return self.reason

    def _find_request(self, ignore_time_limit: bool) -> str | None:
        if not ignore_time_limit and self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit"
        if self._stop_file is not None and self._stop_file.exists():
            return "megagpt stop"
        return None

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signaled_at is not None and now > self._signaled_at + _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        name = signal.Signals(number).name
        if self._signaled_at is None:
            self._signaled_at = now
            if self._notify is not None:
                self._notify(
                    f"\n{name}: finishing this update and saving. "
                    f"Send it again after {_SAME_REQUEST:.0f} s to stop at once without saving."
                )
        self._request = self._request or name


def stop(run: Path) -> RunStatus:
    """Request that a run saves and stops, by creating its stop file (`megagpt stop`).

    If the run is not running, no stop file is left behind, so that the next start is not stopped.

    Returns:
        The status of the run.

    Raises:
        UserError: if there is no such run directory.
    """
    found = status.read(run)
    if found.state == "running":
        files.replace_text(run / STOP_FILE, "")
        found = status.read(run)  # the run may have ended in the meantime, with or without detecting the file
    if found.state != "running":
        (run / STOP_FILE).unlink(missing_ok=True)
    return found
