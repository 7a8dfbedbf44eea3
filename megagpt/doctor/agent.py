"""The doctor's part on each host: takes orders and gives answers, a line of JSON each, until the other end is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from megagpt.doctor import facts
from megagpt.doctor.children import Child
from megagpt.doctor.token import Token
from megagpt.files import parse_json

MARK = "megagpt-doctor "
"""Each line of the talk begins so: what a shell's start-up prints is passed over."""


ORDERS = ("hello", "facts", "clock", "look", "tidy", "probe", "reduce")
"""The methods of Agent that may be ordered, and no others."""


class Sink(Protocol):
    """Takes lines of text."""

    def write(self, line: str, /) -> object:
        """Take a line."""

    def flush(self) -> object:
        """Have it on its way."""


class Agent:
    """Does what it is ordered to; each order is the name of a method, with its arguments."""

    def __init__(self, say: Callable[[dict[str, Any]], None], who: dict[str, Any]) -> None:
        self._say, self._who = say, who
        self._token: Token | None = None

    def hello(self, limit: float) -> dict[str, Any]:
        """Who this is. After `limit` seconds it ends by itself."""
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(1))
        signal.alarm(round(limit))
        return {"host": socket.gethostname(), **self._who}

    def facts(self, needs: dict[str, Any], name: str, number: int) -> dict[str, Any]:
        """Everything that needs no torch; and a token in the run directory, if there is one."""
        found = facts.gather(needs, self._doing)
        if needs["run_dir"]:
            self._doing(f"run directory, writing into {needs['run_dir']}")
            self._token = Token(Path(needs["run_dir"]), name, number)
            found["run"] = self._token.write()
        return found

    def clock(self) -> dict[str, Any]:
        """The time of day here."""
        return {"time": time.time()}

    def look(self) -> dict[str, Any]:
        """Whose tokens are seen here."""
        return {"seen": self._token.seen() if self._token else []}

    def tidy(self, folders: bool) -> dict[str, Any]:
        """Take the token away, or the folders that were made for it."""
        if self._token and folders:
            self._token.remove_folders()
        elif self._token:
            self._token.remove()
        return {}

    def probe(self, limit: float, **words: Any) -> dict[str, Any]:
        """What torch and DeepSpeed say of this host, by a process of its own."""
        return Child("probe", {**words, "limit": limit}).answers(limit, self._doing)

    def reduce(self, limit: float, ranks: list[list[int]], **words: Any) -> dict[str, Any]:
        """An all-reduce with the ranks of all hosts; what each of these (rank, local rank) says of it."""
        words["limit"] = limit
        children = [Child("reduce", {**words, "rank": rank, "local_rank": local}) for rank, local in ranks]
        end = time.monotonic() + limit
        return {"ranks": [child.answers(end - time.monotonic(), self._doing) for child in children]}

    def _doing(self, what: str) -> None:
        self._say({"doing": what})


def serve(source: Iterable[str], sink: Sink, **who: Any) -> None:
    """Take orders from `source` until it ends, or until it says so. `who` is what this process says of itself."""

    def say(answer: dict[str, Any]) -> None:
        sink.write(f"{MARK}{json.dumps(answer)}\n")
        sink.flush()

    agent = Agent(say, who)
    try:
        for line in source:
            if not line.startswith(MARK):
                continue
            order = dict(parse_json(line[len(MARK) :]))
            name = order.pop("order")
            if name == "end":
                break
            if name not in ORDERS:
                raise ValueError(f"no such order: {name!r:.40}")
            say({"answer": getattr(agent, name)(**order)})
    except (BrokenPipeError, ConnectionError):
        pass  # nobody is there to be told
    finally:
        agent.tidy(folders=False)
        agent.tidy(folders=True)


def main() -> None:
    """Talk through standard input and output; what else is printed goes to standard error."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, sink)
