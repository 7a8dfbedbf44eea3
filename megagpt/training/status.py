"""Status of a run, recorded in files, because launchers may lose the exit codes of ranks and even the ranks themselves.

Rank 0 writes `status.json` when it starts and when it ends. In between, its heartbeat (training/watchdog.py) shows
that it is alive. A job script may write the file even earlier. It calls `megagpt mark-starting RUN PID` to announce
that process PID is about to start the ranks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.cluster import TIME_LIMIT, Rank
from megagpt.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EXIT_RUNNING, UserError

FILE = "status.json"
# A file with this name marks a run as complete. It is written after the last checkpoint has been verified.
DONE = "DONE"
# A file with this name in the run directory requests a stop.
STOP_FILE = "STOP"
# Seconds without a heartbeat after which rank 0 is presumed dead. Heartbeats are written every second.
_HEARTBEAT_TIMEOUT = 60.0
# Names of states in console output. `requeue` is meant for job scripts, but a user may also have pressed Ctrl-C.
_LABELS = {"requeue": "stopped"}


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    `state` is "done", "running", "requeue" (stopped and saved) or "failed". `code` is the exit code that corresponds to
    the state. `why` is an explanation for users.
    """

    state: str
    code: int
    why: str

    def __str__(self) -> str:
        return f"{_LABELS.get(self.state, self.state)}: {self.why}"


class StatusFile:
    """Status file in which rank 0 records its start and its end. On other ranks, the methods do nothing.

    Errors when writing the file are ignored, because a full disk must not end the run at this point.
    """

    def __init__(self, run: Path, rank: Rank) -> None:
        self._run = run if rank.main else None

    def start(self) -> None:
        """Record that the run has started.

        A stop file that already exists was meant for an earlier start and is removed. It is not removed if a job script
        has announced this start, because the stop may have been requested after the announcement.
        """
        if self._run is None:
            return
        if _read_json(self._run / FILE).get("state") != "starting":
            with contextlib.suppress(OSError):
                (self._run / STOP_FILE).unlink(missing_ok=True)
        self._write(state="running")

    def end(self, code: int, why: str = "") -> None:
        """Record that training has ended.

        Args:
            code: exit code of the process.
            why: reason for the stop, or the error message.
        """
        self._write(state={EXIT_DONE: "done", EXIT_REQUEUE: "requeue"}.get(code, "failed"), code=code, why=why)

    def _write(self, **values: str | int) -> None:
        if self._run is not None:
            with contextlib.suppress(OSError):
                _write(self._run / FILE, os.getpid(), **values)


def mark_starting(run: Path, pid: int) -> None:
    """Record that process `pid` is about to start the ranks of the run. The run then counts as running."""
    _write(run / FILE, pid, state="starting")


def read(run: Path) -> RunStatus:
    """Return the status of a run.

    If a process of the run is alive, the run is running. Otherwise the file DONE takes precedence over `status.json`.

    Raises:
        UserError: if there is no run directory.
    """
    if not run.is_dir():
        raise UserError(f"there is no run directory {run}", str(run), "give the run_dir of the recipe")
    record = _read_json(run / FILE)
    has_started = record.get("state") in ("starting", "running")
    if has_started and (life := _sign_of_life(run, record)):
        return RunStatus("running", EXIT_RUNNING, life)
    if (run / DONE).exists():
        return RunStatus("done", EXIT_DONE, "the last checkpoint was saved and verified")
    if record.get("state") == "requeue":
        cause = f" after {record['why']}" if record.get("why") else ""
        return RunStatus("requeue", EXIT_REQUEUE, f"checkpoint saved{cause}; run the same command to resume")
    if record.get("state") == "failed":
        return RunStatus("failed", int(record["code"]), record["why"] or "see logs/")
    if has_started:
        who = "rank 0" if record["state"] == "running" else "the launcher"
        why = f"{who} (process {record['pid']} on {record['host']}) ended without recording why"
        return RunStatus("failed", EXIT_FAILURE, why)
    return RunStatus("failed", EXIT_FAILURE, "the run never started, or its file DONE was removed")


def _sign_of_life(run: Path, record: dict[str, str]) -> str:
    """Return a description of what rank 0 was doing when it was last seen alive, or "" if it is presumed dead."""
    heartbeat = run / "logs/rank-0.heartbeat"
    beaten_at, started_at = _modified(heartbeat), _modified(run / FILE)
    # If there is no heartbeat, or only one of an earlier process, rank 0 may still be loading data and building.
    if beaten_at < started_at:
        since, timeout = started_at, TIME_LIMIT.total_seconds()
    else:
        since, timeout = beaten_at, _HEARTBEAT_TIMEOUT
    on_this_host = record["host"] == socket.gethostname() and Path("/proc/self").exists()
    if on_this_host and not Path(f"/proc/{record['pid']}").exists():
        return ""
    age = time.time() - since
    if age > timeout:
        return ""
    beat = _read_json(heartbeat) if beaten_at >= started_at else {}
    doing = f"{beat['phase']} of update {beat['update']}" if beat else "starting"
    return f"{doing} on {record['host']}, seen {max(age, 0):.0f} s ago"


def _write(path: Path, pid: int, **values: str | int) -> None:
    files.replace_json(path, {**values, "host": socket.gethostname(), "pid": pid})


def _modified(path: Path) -> float:
    """Return the time at which a file was last written, in seconds since the epoch, or 0 if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_json(path: Path) -> dict[str, str]:
    """Return the JSON object in a file, or an empty dictionary if the file is missing or damaged."""
    try:
        return dict(files.parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
