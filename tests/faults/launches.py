"""Starts ranks quickly, by forking a process that has already imported torch and DeepSpeed.

In all other respects they are like a launcher's processes: each has its own pid, environment and log.
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

SLOW_DATA = {"kind": "slow", "method": "megagpt.data.loader:Loader.batches", "seconds": 0.1}  # leaves time for faults


class Launch:
    """The ranks of one launch. Their faults and console outputs are recorded in files in `folder`."""

    def __init__(self, folder: Path, processes: Sequence) -> None:
        self.started = time.monotonic()
        self._folder, self._processes = folder, processes
        for name in ("fired", *(f"console-{rank}" for rank in range(len(processes)))):
            (folder / name).write_text("")

    def pids(self) -> list[int]:
        """Return the process id of each rank."""
        return [process.pid for process in self._processes]

    def codes(self) -> list[int | None]:
        """Return the exit code of each rank: None while it runs, negative if it was ended by a signal."""
        return [process.exitcode for process in self._processes]

    def wait(self, seconds: float, all_but: Sequence[int] = ()) -> list[int | None]:
        """Wait until all ranks except `all_but` have ended, or for `seconds`, and return the exit codes."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self._processes):
            if rank not in all_but:
                process.join(max(0.0, end - time.monotonic()))
        return self.codes()

    def fired(self) -> list[dict]:
        """Return the faults that have happened inside the ranks, in order."""
        lines = (self._folder / "fired").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def fires(self, name: str, seconds: float) -> bool:
        """Wait until the fault of this name has happened. Returns False if a rank ends before, or after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = any(code is not None for code in self.codes())  # checked first: a rank may end just after the fault
            if any(fault["name"] == name for fault in self.fired()):
                return True
            if ended:
                return False
            time.sleep(0.005)
        return False

    def printed(self, rank: int = 0) -> str:
        """Return the console output of a rank, both streams."""
        return (self._folder / f"console-{rank}").read_text()


@contextmanager
def launch(
    recipe: Path, *arguments: str, folder: Path, world: int = 2, config: str = "zero1", faults: Sequence[dict] = ()
) -> Iterator[Launch]:
    """Start `world` ranks with faults installed. Ranks that still run at the end of the `with` block are killed."""
    env = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "FAULTS": json.dumps(list(faults)), "FIRED": str(folder / "fired"),
    }  # fmt: skip
    train_arguments = training.command(recipe, *arguments, config=config)[2:]
    processes = []
    for rank in range(world):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(forks.process(_train, {**env, **rank_env}, train_arguments, folder / f"console-{rank}"))
    started = Launch(folder, processes)
    with forks.running(processes):
        yield started


def _train(env: dict[str, str], arguments: list[str], console: Path) -> None:
    """Run one rank in the forked process, with its output in a file."""
    os.environ.update(env)
    file = os.open(console, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    from megagpt import cli
    from tests.faults import hooks

    hooks.install()
    code = cli.main(["train", *arguments])
    sys.stdout.flush()
    os._exit(code)
