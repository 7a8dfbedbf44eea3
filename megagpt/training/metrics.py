"""The event log of a run, metrics.jsonl, which contains one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.files import open_to_append, parse_json, replace_text
from megagpt.training import time_breakdown as times

NAME = "metrics.jsonl"
# These events make the run skip data for good, even if it later goes back to an update before them.
_SKIP_EVENTS = ("skip", "rollback")
# All of these events are replayed, and so are the last updates.
_REPLAYABLE_EVENTS = ("checkpoint", *_SKIP_EVENTS)
_REPLAYED_KEYS = ("event", "update", "loss", "grad_norm", "position", "samples")


class Metrics:
    """Event log of a run. On ranks other than 0 (`main` is False), its methods do nothing.

    If the disk is full, events are kept in memory and written together with the next event, so the log has no gap.

    `replayable` holds the events from which `Health` rebuilds its state: checkpoints, skips, rollbacks and the last
    `window` updates. `events_at_resume` counts, by kind, the logged events of the update at which the run resumes.
    `truncate` sets both attributes.

    Args:
        run: the run directory.
        main: whether this is rank 0.
        window: number of recent updates with which `Health` compares an update.
    """

    def __init__(self, run: Path, main: bool, window: int) -> None:
        self._path = run / NAME
        self._main = main
        self._window = window
        self._file: int | None = None
        self._unwritten = b""
        self.replayable: list[dict[str, Any]] = []
        self.events_at_resume: Counter[str] = Counter()

    def truncate(self, update: int) -> float:
        """Remove the events after `update`, because the run repeats these updates, and open the log for appending.

        Skips and rollbacks are kept, because the run never uses the data that they skipped.

        Returns:
            The training time in seconds that was spent on the removed events.
        """
        if not self._main:
            return 0.0
        self.close()
        kept: list[dict[str, Any]] = []
        lost_seconds = 0.0
        if self._path.exists():
            kept, lost_seconds = _truncate(self._path, update)
        self.replayable = _select_replayable(kept, self._window)
        self.events_at_resume = Counter(record["event"] for record in kept if record["update"] == update)
        self._file = open_to_append(self._path)
        return lost_seconds

    def write(self, event: str, **values: Any) -> None:
        """Append an event. Unless the disk is full, it is passed to the operating system immediately."""
        if self._file is None:
            return
        self._unwritten += json.dumps({"event": event, **values}).encode() + b"\n"
        with contextlib.suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read(run: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of a run in order. An incomplete last line, which a crash can cause, is ignored.

    Args:
        run: the run directory.
        event: kind of the events to yield, or None for all events.

    Raises:
        UserError: if a line is not an event.
    """
    with (run / NAME).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                record = _parse(line, f"{run / NAME}:{number}")
                if event is None or record["event"] == event:
                    yield record


def time_breakdown(run: Path) -> times.TimeBreakdown:
    """Return the time breakdown of a run over all its processes."""
    return times.add_up(read(run))


def _parse(line: str, where: str) -> dict[str, Any]:
    """Return the event on a line. Raises UserError if the line is not an event."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"this line is not JSON: {error}", where, "remove the line, or restore the file") from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise UserError("this line is not an event of a run", where, "remove the line, or restore the file")
    return record


def _select_replayable(records: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Return the events from which `Health` rebuilds its state, reduced to the values that it needs."""
    updates = [record["update"] for record in records if record["event"] == "update"]
    first = updates[-window:][0] if updates else 0
    return [
        {key: record[key] for key in _REPLAYED_KEYS if key in record}
        for record in records
        if record["event"] in _REPLAYABLE_EVENTS or (record["event"] == "update" and record["update"] >= first)
    ]


def _truncate(path: Path, update: int) -> tuple[list[dict[str, Any]], float]:
    """Truncate the log to `update`. Returns the remaining events, and the seconds spent on the removed events."""
    records = list(read(path.parent))
    kept = [
        record
        for record in records
        if record["event"] in _SKIP_EVENTS or (record["update"] <= update and record["event"] != "done")
    ]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept, times.add_up(records).total - times.add_up(kept).total
