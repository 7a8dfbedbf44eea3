"""Ranks that start quickly: forked from one process that has imported torch and DeepSpeed already.

All else is as it is for a launcher's process: each has a pid, an environment and a log of its own, and is killed alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megagpt.cluster import free_port
from tests import forks, training

SLOW_DATA = {"kind": "slow", "method": "megagpt.data.loader:Loader.batches", "seconds": 0.1}  # so that a run can be hit


class Launch:
    """The ranks of one launch, whose faults and consoles are files of `folder`."""

    def __init__(self, folder: Path, processes: Sequence) -> None:
        self.started = time.monotonic()
        self._folder, self._processes = folder, processes
        for name in ("fired", *(f"console-{rank}" for rank in range(len(processes)))):
            (folder / name).write_text("")

    def pids(self) -> list[int]:
        """Of the ranks, in their order."""
        return [process.pid for process in self._processes]

    def codes(self) -> list[int | None]:
        """The exit code of each rank, None while it lives, a signal's number with a minus."""
        return [process.exitcode for process in self._processes]

    def wait(self, seconds: float, all_but: Sequence[int] = ()) -> list[int | None]:
        """The exit codes, when all (but those) have ended or the time is over."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self._processes):
            if rank not in all_but:
                process.join(max(0.0, end - time.monotonic()))
        return self.codes()

    def fired(self) -> list[dict]:
        """The faults that have happened inside the ranks, in their order."""
        lines = (self._folder / "fired").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def fires(self, name: str, seconds: float) -> bool:
        """Wait until the fault of this name has happened; False where a rank has ended before it, or time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = any(code is not None for code in self.codes())  # looked at first: it may end just after the fault
            if any(fault["name"] == name for fault in self.fired()):
                return True
            if ended:
                return False
            time.sleep(0.005)
        return False

    def printed(self, rank: int = 0) -> str:
        """What a rank has put on its console, both streams."""
        return (self._folder / f"console-{rank}").read_text()


@contextmanager
def launch(
    recipe: Path, *arguments: str, folder: Path, world: int = 2, config: str = "zero1", faults: Sequence[dict] = ()
) -> Iterator[Launch]:
    """Start `world` ranks with these faults in them; whatever is left of them at the end is killed."""
    env = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "FAULTS": json.dumps(list(faults)), "FIRED": str(folder / "fired"),
    }  # fmt: skip
    words = training.command(recipe, *arguments, config=config)[2:]
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(forks.process(_train, {**env, **place}, words, folder / f"console-{rank}"))
    started = Launch(folder, processes)
    try:
        for process in processes:
            process.start()
        yield started
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _train(env: dict[str, str], words: list[str], console: Path) -> None:
    """One rank, in the forked process; what it prints goes to a file."""
    os.environ.update(env)
    file = os.open(console, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    from megagpt import cli
    from tests.faults import hooks

    hooks.install()
    code = cli.main(["train", *words])
    sys.stdout.flush()
    os._exit(code)
