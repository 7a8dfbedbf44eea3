"""How a run stands, from what it leaves on disk: launchers lose exit codes, and some lose the ranks themselves.

Rank 0 writes `status.json` when it starts and when it ends. In between its heartbeat (training/watchdog.py) shows
that it is alive.
A job script may write it before, with `megagpt mark-starting RUN PID`: process PID is about to start the ranks.
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
from megagpt.training.stop_signals import REQUEST

FILE = "status.json"
DONE = "DONE"  # written only after the last checkpoint was read back
_SILENT = 60.0  # seconds without a heartbeat, which is written every second: the process is gone


@dataclass(frozen=True)
class Standing:
    """`state` is done, running, requeue or failed; `code` is the exit code that means it; `why` is for people."""

    state: str
    code: int
    why: str

    def __str__(self) -> str:
        return f"{self.state}: {self.why}"


class Note:
    """What rank 0 writes of its own start and end; on other ranks, nothing. A full disk stops no run here.

    A request to stop that lies there already was made to an earlier start, and goes; unless a job script has said that
    this one comes.
    """

    def __init__(self, run: Path, rank: Rank) -> None:
        self._path = run / FILE if rank.main else None
        if rank.main and _json(run / FILE).get("state") != "starting":
            with contextlib.suppress(OSError):
                (run / REQUEST).unlink(missing_ok=True)
        self._write(state="running")

    def end(self, code: int, why: str = "") -> None:
        """Training ends with this exit code."""
        self._write(state={EXIT_DONE: "done", EXIT_REQUEUE: "requeue"}.get(code, "failed"), code=code, why=why)

    def _write(self, **said: str | int) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                _write(self._path, os.getpid(), **said)


def mark_starting(run: Path, pid: int) -> None:
    """Record that process `pid` is about to start the ranks of the run: from now on it counts as running."""
    _write(run / FILE, pid, state="starting")


def read(run: Path) -> Standing:
    """How a run stands. Raises UserError where there is no run directory.

    DONE decides before all else but a living process.
    """
    if not run.is_dir():
        raise UserError(f"there is no run directory {run}", str(run), "give the run_dir of the recipe")
    note = _json(run / FILE)
    alive = note.get("state") in ("starting", "running")
    if alive and (life := _life(run, note)):
        return Standing("running", EXIT_RUNNING, life)
    if (run / DONE).exists():
        return Standing("done", EXIT_DONE, "the last checkpoint was read back")
    if note.get("state") == "requeue":
        return Standing("requeue", EXIT_REQUEUE, "stopped and saved; the same command goes on")
    if note.get("state") == "failed":
        return Standing("failed", int(note["code"]), note["why"] or "see logs/")
    if alive:
        who = "rank 0" if note["state"] == "running" else "the launcher"
        return Standing("failed", EXIT_FAILURE, f"{who} (process {note['pid']} of {note['host']}) ended without a word")
    return Standing("failed", EXIT_FAILURE, "it never started, or DONE was taken away")


def _life(run: Path, note: dict[str, str]) -> str:
    """A sign that rank 0 lives, in words; "" where there is none."""
    beat = run / "logs/rank-0.heartbeat"
    seen, started = _written(beat), _written(run / FILE)
    since, limit = (seen, _SILENT)
    if seen < started:  # none yet, or an earlier process's: it loads, builds, compiles
        since, limit = started, TIME_LIMIT.total_seconds()
    age = time.time() - since
    if (
        note["host"] == socket.gethostname()
        and not Path(f"/proc/{note['pid']}").exists()
        and Path("/proc/self").exists()
    ):
        return ""
    if age > limit:
        return ""
    said = _json(beat) if seen >= started else {}
    doing = f"{said['phase']} of update {said['update']}" if said else "starting"
    return f"{doing} on {note['host']}, seen {max(age, 0):.0f} s ago"


def _write(path: Path, pid: int, **said: str | int) -> None:
    files.replace_json(path, {**said, "host": socket.gethostname(), "pid": pid})


def _written(path: Path) -> float:
    """When a file was last written, in seconds of `time.time`; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _json(path: Path) -> dict[str, str]:
    """A file's JSON object; empty where there is none, or half of one."""
    try:
        return dict(files.parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
