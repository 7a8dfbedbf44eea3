"""Save checkpoints at once, or in the background while training continues.

Both ways use the same `PendingSave`. A synchronous save runs its stages at once. An asynchronous save first copies the
state to host memory, which is all that training waits for, and runs the file work of each stage on a background
thread. That thread never communicates with other ranks: after every update the training loop calls `Saver.advance`,
in which all ranks agree whether any is still writing files, and enter the next stage together when none is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint.store import PendingSave, Store
from megagpt.files import WriteFile
from megagpt.state import TrainState


class SaveFailed(Exception):
    """Too many saves failed. Checkpoints that were published before are unchanged. The same on every rank."""


@dataclass(frozen=True)
class SaveResult:
    """Result of one save, the same on every rank except for the times.

    `problem` is the reason why the checkpoint was not published, or what failed after it was; "" if nothing did.
    `blocking_seconds` is the time that training waited, `write_seconds` the duration of this rank's file work.
    """

    state: TrainState
    folder: Path
    published: bool
    problem: str
    blocking_seconds: float
    write_seconds: float


class Saver:
    """Saves checkpoints of one engine, one at a time. All ranks call the same methods in the same order.

    Args:
        store: where checkpoints are published.
        save_state: writes this rank's part of the engine's state through the function it is given; collective.
        facts: what the manifest records besides the state and the files.
        asynchronous: write files in the background.
    """

    def __init__(
        self, store: Store, save_state: Callable[[WriteFile], None], facts: dict[str, Any], asynchronous: bool
    ) -> None:
        self._store = store
        self._save_state = save_state
        self._facts = facts
        self._executor = ThreadPoolExecutor(1, "saving") if asynchronous else None  # its thread starts with a save
        self._pending: PendingSave | None = None
        self._file_work: Future[None] | None = None
        self._blocking_seconds = 0.0
        self._write_seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether a background thread of this rank is writing files."""
        return self._file_work is not None and not self._file_work.done()

    def save(self, state: TrainState, wait: bool = False) -> SaveResult | None:
        """Start to save a checkpoint of the present state. The previous save must be finished.

        Args:
            state: the training state that belongs to the engine's state.
            wait: return only when the save is finished, even if the saver is asynchronous.

        Returns:
            The result if the save is finished, else None.
        """
        assert self._pending is None, "one save at a time"
        start = time.perf_counter()
        self._blocking_seconds = 0.0
        self._write_seconds = 0.0
        write = self._save_state if self._executor is None else _copy_to_host(self._save_state)
        self._pending = PendingSave(self._store, state, write, self._facts)
        self._pending.prepare()
        if not self._pending.done:
            self._run(self._pending.write_files)
        return self._result(start, wait or self._executor is None)

    def advance(self) -> SaveResult | None:
        """Continue a save in the background if no rank is writing files. Collective.

        Returns:
            The result if this finished the save, else None.
        """
        if self._pending is None or self._store.collectives.any(self.writing):
            return None
        start = time.perf_counter()
        self._enter_next_stage(self._pending)
        return self._result(start, wait=False)

    def finish(self) -> SaveResult | None:
        """Wait for a save in the background, on all ranks. Returns its result, or None if there was none."""
        return self._result(time.perf_counter(), wait=True)

    def close(self) -> None:
        """Let the background thread end, without waiting for it."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _result(self, start: float, wait: bool) -> SaveResult | None:
        """Return the result of a finished save. Training has been blocked since `start`."""
        pending = self._pending
        if pending is None:
            return None
        while wait and not pending.done:
            self._enter_next_stage(pending)
        self._blocking_seconds += time.perf_counter() - start
        if not pending.done:
            return None
        self._pending = None
        return SaveResult(
            state=pending.state,
            folder=pending.folder,
            published=pending.published,
            problem=pending.problem,
            blocking_seconds=self._blocking_seconds,
            write_seconds=self._write_seconds,
        )

    def _enter_next_stage(self, pending: PendingSave) -> None:
        """Wait for this rank's file work, agree on its outcome with all ranks, and begin the next stage."""
        if self._file_work is not None:
            self._file_work.result()
        pending.agree()
        if not pending.done:
            self._run(pending.publish)

    def _run(self, work: Callable[[], None]) -> None:
        """Do file work, in the background if the saver is asynchronous."""
        if self._executor is None:
            self._timed(work)
        else:
            self._file_work = self._executor.submit(self._timed, work)

    def _timed(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self._write_seconds += time.perf_counter() - start


def _copy_to_host(save_state: Callable[[WriteFile], None]) -> Callable[[WriteFile], None]:
    """Copy the present state to host memory. Returns a function that writes it, freeing each file once written."""
    copies: list[tuple[str, bytes]] = []
    save_state(lambda name, data: copies.append((name, data)))

    def write(sink: WriteFile) -> None:
        while copies:
            sink(*copies.pop(0))

    return write
