"""Save checkpoints synchronously, or in the background while training continues.

Both modes use `PendingSave`. A synchronous save runs all its stages before it returns. An asynchronous save blocks
training only while it copies the state to host memory, and runs the file work of each stage on a background thread.
That thread never communicates with other ranks. Instead, the training loop calls `Saver.advance` after every update. In
this method all ranks exchange whether any of them is still writing files, and enter the next stage together if none is.
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
    """Raised on every rank if a save failed and training cannot continue. Earlier checkpoints are unchanged."""


@dataclass(frozen=True)
class SaveResult:
    """Result of one save, which is the same on every rank except for the times.

    `problem` is the error that prevented the checkpoint from being published or that occurred after publishing it, or
    "" if there was no error. `blocking_seconds` is the time for which training waited. `write_seconds` is the duration
    of this rank's file work.
    """

    state: TrainState
    folder: Path
    published: bool
    problem: str
    blocking_seconds: float
    write_seconds: float


class Saver:
    """Saver of checkpoints of one engine, one at a time. All ranks must call its methods in the same order.

    Args:
        store: store in which checkpoints are published.
        save_state: collective function that writes this rank's part of the engine's state through its argument.
        facts: values that the manifest records in addition to the state and the files.
        asynchronous: whether to write files in the background.
    """

    def __init__(
        self, store: Store, save_state: Callable[[WriteFile], None], facts: dict[str, Any], asynchronous: bool
    ) -> None:
        self._store = store
        self._save_state = save_state
        self._facts = facts
        self._executor = ThreadPoolExecutor(1, "saving") if asynchronous else None  # the first save starts the thread
        self._pending: PendingSave | None = None
        self._file_work: Future[None] | None = None
        self._blocking_seconds = 0.0
        self._write_seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether the background thread of this rank is writing files."""
        return self._file_work is not None and not self._file_work.done()

    def save(self, state: TrainState, wait: bool = False) -> SaveResult | None:
        """Start saving a checkpoint of the current state. The previous save must be finished.

        Args:
            state: the current training state.
            wait: whether to wait until the save is finished, even if the saver is asynchronous.

        Returns:
            The result if the save is finished, or None if it continues in the background.
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
        """Enter the next stage of a save in the background, if no rank is writing files. Collective.

        Returns:
            The result if the save is now finished, or None otherwise.
        """
        if self._pending is None or self._store.collectives.any(self.writing):
            return None
        start = time.perf_counter()
        self._enter_next_stage(self._pending)
        return self._result(start, wait=False)

    def finish(self) -> SaveResult | None:
        """Wait for the save in the background. Returns its result, or None if no save was pending. Collective."""
        return self._result(time.perf_counter(), wait=True)

    def close(self) -> None:
        """Shut down the background thread without waiting for it."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _result(self, start: float, wait: bool) -> SaveResult | None:
        """Return the result of the pending save if it is finished, or None otherwise.

        Args:
            start: value of time.perf_counter when the save began to block training.
            wait: whether to wait until the save is finished.
        """
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
        """Wait for this rank's file work, exchange its outcome with all ranks, and begin the next stage."""
        if self._file_work is not None:
            self._file_work.result()
        pending.agree()
        if not pending.done:
            self._run(pending.publish)

    def _run(self, work: Callable[[], None]) -> None:
        """Run file work, in the background if the saver is asynchronous."""
        if self._executor is None:
            self._timed(work)
        else:
            self._file_work = self._executor.submit(self._timed, work)

    def _timed(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self._write_seconds += time.perf_counter() - start


def _copy_to_host(save_state: Callable[[WriteFile], None]) -> Callable[[WriteFile], None]:
    """Copy the current state to host memory. Returns a function that writes the copy and frees it file by file."""
    copies: list[tuple[str, bytes]] = []
    save_state(lambda name, data: copies.append((name, data)))

    def write(sink: WriteFile) -> None:
        while copies:
            sink(*copies.pop(0))

    return write
