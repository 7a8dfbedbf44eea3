"""metrics.jsonl, the record of a run: one JSON object a line, losses with full float precision."""

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
from megagpt.training import time_breakdown

NAME = "metrics.jsonl"
_DECISIONS = ("skip", "rollback")  # data that is left out for good
_DECISIVE = ("checkpoint", *_DECISIONS)  # and updates
_KEYS = ("event", "update", "loss", "grad_norm", "position", "samples")


class Metrics:
    """Appends events to a run's record. On ranks other than 0 (`main` false) it does nothing.

    What the disk has no room for waits in memory for the next event: a full disk leaves no gap in the record.
    What is on record up to `resumed_at`, or after `go_back`, is read once: `decisive` is what decisions about bad
    numbers depend on, of updates the last `window`; `here` how many events of each kind there are of that very update.
    """

    def __init__(self, run: Path, main: bool, resumed_at: int, window: int) -> None:
        self._path, self._window = run / NAME, window
        self._file: int | None = None
        self._waiting = b""
        self.decisive: list[dict[str, Any]] = []
        self.here: Counter[str] = Counter()
        self.lost_seconds = self._open(resumed_at) if main else 0.0  # of what was recorded after `resumed_at`

    def go_back(self, update: int) -> float:
        """Forget what was recorded after `update`; the seconds that it took."""
        if self._file is None:
            return 0.0
        self.close()
        return self._open(update)

    def _open(self, update: int) -> float:
        kept, lost = _truncate(self._path, update) if self._path.exists() else ([], 0.0)
        self.decisive = _decisive(kept, self._window)
        self.here = Counter(record["event"] for record in kept if record["update"] == update)
        self._file = open_to_append(self._path)
        return lost

    def write(self, event: str, **values: Any) -> None:
        """Append one event; it is on its way to the disk when this returns, if there is room."""
        if self._file is None:
            return
        self._waiting += json.dumps({"event": event, **values}).encode() + b"\n"
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read(run: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a run in order, or only those of one kind; a last line cut short by a crash is left out."""
    with (run / NAME).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                record = _record(line, f"{run / NAME}:{number}")
                if event is None or record["event"] == event:
                    yield record


def _record(line: str, where: str) -> dict[str, Any]:
    """Return the event on a line. Raises UserError if it is none."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"this line is not JSON: {error}", where, "remove the line, or restore the file") from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise UserError("this line is not an event of a run", where, "remove the line, or restore the file")
    return record


def spent(run: Path) -> time_breakdown.Times:
    """Where the run's seconds went, all its restarts together."""
    return time_breakdown.of(read(run))


def _decisive(records: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Decisive events without their other values."""
    updates = [record["update"] for record in records if record["event"] == "update"]
    first = updates[-window:][0] if updates else 0
    return [
        {key: record[key] for key in _KEYS if key in record}
        for record in records
        if record["event"] in _DECISIVE or (record["event"] == "update" and record["update"] >= first)
    ]


def _truncate(path: Path, update: int) -> tuple[list[dict[str, Any]], float]:
    """Drop what was recorded after `update`: it will be made again, as was decided. What stays, and the seconds that
    the rest took.
    """
    records = list(read(path.parent))
    kept = [
        record
        for record in records
        if record["event"] in _DECISIONS or (record["update"] <= update and record["event"] != "done")
    ]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept, time_breakdown.of(records).total - time_breakdown.of(kept).total
