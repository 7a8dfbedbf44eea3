"""A process of the doctor's own for what may hang, crash or take long: torch, DeepSpeed, compilers, the network."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.doctor import facts
from megagpt.files import parse_json


class Child:
    """`python -m megagpt.doctor.MODULE WORDS`: each line that it prints is a JSON object, a part of its answer."""

    def __init__(self, module: str, words: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"megagpt.doctor.{module}", json.dumps(words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._lines.put, True), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stderr, self._errors.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def answers(self, limit: float, doing: Callable[[str], None]) -> dict[str, Any]:
        """All that it says within `limit` seconds; it and what it started are gone then.

        `died` is the last line of its errors where it did not end well, `hung` the limit where time was up, and `at`
        says at what it was then.
        """
        found: dict[str, Any] = {}
        at, end = "the start", time.monotonic() + limit
        try:
            while line := self._lines.get(timeout=max(end - time.monotonic(), 0)):
                said = parse_json(line)
                at = said.pop("doing", at)
                doing(at)
                found.update(said)
            code = self._process.wait(max(end - time.monotonic(), 0))
        except (queue.Empty, subprocess.TimeoutExpired):
            found |= {"hung": limit, "at": at}
        else:
            if code:
                self._readers[1].join(1)
                last = next((line.strip() for line in reversed(self._errors) if line.strip()), f"exit code {code}")
                found |= {"died": last, "at": at}
        finally:
            self._kill()
        return found

    def _kill(self) -> None:
        """End it and what it started; a lock of a build that dies with it would stop the next one for ever."""
        held = [Path(lock["path"]) for lock in facts.locks() if self._process.pid in facts.holders(Path(lock["path"]))]
        for process in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process) == self._process.pid:  # not only its group: ninja gives each compiler its own
                    os.kill(process, signal.SIGKILL)
        self._process.wait()
        for lock in held:
            lock.unlink(missing_ok=True)

    @staticmethod
    def _read(stream: Any, put: Callable[[str], None], ends: bool = False) -> None:
        """Hand on the lines of a stream that are parts of an answer, or all of errors; "" says that it has ended."""
        with stream:
            for line in stream:
                if line.startswith("{") or not ends:
                    put(line)
        if ends:
            put("")


def begin() -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    """In such a process: its words, and how it says a part of its answer. What else it prints goes to its errors."""
    words: dict[str, Any] = parse_json(sys.argv[1])
    signal.alarm(round(words["limit"]) + 5)  # if who started it is gone
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(part: dict[str, Any]) -> None:
        print(json.dumps(part), file=out, flush=True)

    return words, say
