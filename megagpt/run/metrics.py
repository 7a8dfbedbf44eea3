"""metrics.jsonl, the record of a run: one JSON object a line, losses with full float precision."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.files import replace_text
from megagpt.run import times

NAME = "metrics.jsonl"
_DECISIONS = ("skip", "rollback")  # data that is left out for good
_KEYS = ("event", "update", "loss", "grad_norm", "position", "samples")


class Metrics:
    """Appends events to a run's record. On ranks other than 0 (`main` false) it does nothing.

    What the disk has no room for waits in memory for the next event: a full disk leaves no gap in the record.
    """

    def __init__(self, run: Path, main: bool, resumed_at: int) -> None:
        self._path = run / NAME
        self._file: int | None = None
        self._waiting = b""
        self.lost_seconds = self._open(resumed_at) if main else 0.0  # of what was recorded after `resumed_at`

    def go_back(self, update: int) -> float:
        """Forget what was recorded after `update`; the seconds that it took."""
        if self._file is None:
            return 0.0
        self.close()
        return self._open(update)

    def has(self, event: str, update: int) -> bool:
        """Whether an event of this kind is on record for this update; only rank 0 knows."""
        return self._file is not None and any(record["update"] == update for record in read(self._path.parent, event))

    def _open(self, update: int) -> float:
        lost = _truncate(self._path, update) if self._path.exists() else 0.0
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
        for line in file:
            if line.endswith("\n"):
                record = json.loads(line)
                if event is None or record["event"] == event:
                    yield record


def spent(run: Path) -> times.Times:
    """Where the run's seconds went, all its restarts together."""
    return times.of(read(run))


def decisive(run: Path, last: int) -> list[dict[str, Any]]:
    """The events that decisions about bad numbers depend on, without their other values: of updates the last ones."""
    if not (run / NAME).exists():
        return []
    records = [record for record in read(run) if record["event"] in ("update", "checkpoint", *_DECISIONS)]
    updates = [record["update"] for record in records if record["event"] == "update"]
    first = updates[-last:][0] if updates else 0
    return [
        {key: record[key] for key in _KEYS if key in record}
        for record in records
        if record["event"] != "update" or record["update"] >= first
    ]


def _truncate(path: Path, update: int) -> float:
    """Drop what was recorded after `update`, and the seconds that it took: it will be made again, as was decided."""
    records = list(read(path.parent))
    kept = [
        record
        for record in records
        if record["event"] in _DECISIONS or (record["update"] <= update and record["event"] != "done")
    ]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return times.of(records).total - times.of(kept).total
